"""LLaVA as a text encoder: the states of a prompt with a picture in it.

Source: transformers `modeling_llava.py`; names are those of published files.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from fluxjax.config import LlavaConfig
from fluxjax.models.activation import gelu_exact
from fluxjax.models.clip_vision import CLIPVisionModel
from fluxjax.models.dense import Part
from fluxjax.models.llama import LlamaModel


class Projector(Part):
    """Two layers with a GELU between them: the vision encoder's states as the language model's."""

    width: int

    def setup(self) -> None:
        self.linear_1, self.linear_2 = (self.dense(self.width) for _ in range(2))

    def __call__(self, states: Float[Array, "b n d"]) -> Float[Array, "b n width"]:
        return self.linear_2(gelu_exact(self.linear_1(states)))


class LanguageModel(Part):
    """Without the head that published files have."""

    config: Any
    scan_layers: bool = False

    def setup(self) -> None:
        self.model = LlamaModel(self.config, self.scan_layers, **self.types)

    def embed(self, input_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        return self.model.embed(input_ids)

    def states(self, x: Float[Array, "b l d"], lengths: Int[Array, " b"]) -> Float[Array, "b l d"]:
        return self.model.states(x, lengths)


class LlavaModel(Part):
    """Token ids and a picture -> states, of which the picture's are where its token was."""

    config: LlavaConfig
    scan_layers: bool = False

    def setup(self) -> None:
        text, vision = self.config.text_config, self.config.vision_config
        self.vision_tower = CLIPVisionModel(vision, self.dtype, self.param_dtype, self.scan_layers)
        self.multi_modal_projector = Projector(text.hidden_size, **self.types)
        self.language_model = LanguageModel(text, self.scan_layers, **self.types)

    def __call__(
        self,
        input_ids: Int[Array, "b l"],
        attention_mask: Num[Array, "b l"],
        pixel_values: Float[Array, "b height width 3"],
        place: int = 0,
    ) -> Float[Array, "b longer d"]:
        """`place`: of the picture's token in every row. The mask is 1 for tokens and 0 for padding,
        which comes last; pictures are as CLIP's processor gives them."""
        seen = self.vision_tower(pixel_values.astype(self.dtype)).penultimate_hidden_state[:, 1:]
        picture = self.multi_modal_projector(seen)
        words = self.language_model.embed(input_ids)
        x = jnp.concatenate([words[:, :place], picture, words[:, place + 1 :]], axis=1)
        lengths = attention_mask.sum(axis=1).astype(jnp.int32) + picture.shape[1] - 1
        return self.language_model.states(x, lengths)
