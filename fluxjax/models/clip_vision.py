"""CLIP's vision encoder, and both encoders as one network.

Source: Radford et al. 2021 and transformers' `models/clip/modeling_clip.py`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from fluxjax.config import CLIPConfig, CLIPVisionConfig, ConfigError
from fluxjax.models.clip import (
    CLIPEncoder,
    CLIPTextTransformer,
    embedding_table,
    layer_norm,
    projection,
)
from fluxjax.models.products import own_precision


class CLIPVisionOutput(struct.PyTreeNode):
    """What the vision encoder gives: class token first, `last_hidden_state` not normed.

    `penultimate_hidden_state` is what the last layer reads, `pooler_output` the normed class token,
    `image_embeds` its projection or None.
    """

    last_hidden_state: Float[Array, "b n d"]
    penultimate_hidden_state: Float[Array, "b n d"]
    pooler_output: Float[Array, "b d"]
    image_embeds: Float[Array, "b p"] | None


class CLIPVisionEmbeddings(nn.Module):
    """Patches of pixels and a class token before them, with their positions."""

    config: CLIPVisionConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        self.class_embedding = self.param(
            "class_embedding",
            nn.initializers.normal(c.hidden_size**-0.5),
            (c.hidden_size,),
            self.param_dtype,
        )
        self.patch_embedding = nn.Conv(
            c.hidden_size,
            (c.patch_size, c.patch_size),
            (c.patch_size, c.patch_size),
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=own_precision(self.dtype),
            kernel_init=init,
        )
        positions = (c.image_size // c.patch_size) ** 2 + 1
        self.position_embedding = embedding_table(
            positions, c.hidden_size, self.dtype, self.param_dtype, init
        )

    def __call__(self, pixel_values: Float[Array, "b height width c"]) -> Float[Array, "b n d"]:
        size = self.config.image_size
        if pixel_values.shape[1:3] != (size, size):
            raise ConfigError(
                f"CLIP's vision encoder reads pictures of image_size={size} squared, "
                f"got {pixel_values.shape[1]} x {pixel_values.shape[2]}"
            )
        patches = self.patch_embedding(pixel_values)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        first = self.class_embedding.astype(self.dtype)[None, None]
        first = jnp.broadcast_to(first, (patches.shape[0], 1, patches.shape[-1]))
        states = jnp.concatenate([first, patches], axis=1)
        return states + self.position_embedding(jnp.arange(states.shape[1]))[None]


class CLIPVisionTransformer(nn.Module):
    """Embeddings, norm, encoder, and the norm of the class token."""

    config: CLIPVisionConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    def setup(self) -> None:
        dtypes = (self.dtype, self.param_dtype)
        epsilon = self.config.layer_norm_eps
        self.embeddings = CLIPVisionEmbeddings(self.config, *dtypes)
        self.pre_layrnorm = layer_norm(epsilon, *dtypes)  # spelled so in the checkpoints
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.encoder = CLIPEncoder(self.config, False, self.scan_layers, self.remat, **types)
        self.post_layernorm = layer_norm(epsilon, *dtypes)

    def __call__(self, pixel_values: Float[Array, "b height width c"]) -> CLIPVisionOutput:
        last, before = self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))
        return CLIPVisionOutput(last, before, self.post_layernorm(last[:, 0]), None)


class CLIPVisionModel(nn.Module):
    """Normalised pictures (b, height, width, channels) -> CLIPVisionOutput."""

    config: CLIPVisionConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    def setup(self) -> None:
        self.vision_model = CLIPVisionTransformer(
            self.config, self.dtype, self.param_dtype, self.scan_layers, self.remat
        )
        if self.config.with_projection:
            self.visual_projection = projection(self.config, self.dtype, self.param_dtype)

    def __call__(self, pixel_values: Float[Array, "b height width c"]) -> CLIPVisionOutput:
        output = self.vision_model(pixel_values)
        if not self.config.with_projection:
            return output
        return output.replace(image_embeds=self.visual_projection(output.pooler_output))


class CLIPModel(nn.Module):
    """Both encoders and the temperature: (text_embeds, image_embeds), each normed to length 1.

    exp(logit_scale) x their products are the logits. Source: transformers `modeling_clip.py`.
    """

    config: CLIPConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    def setup(self) -> None:
        text, vision = self.config.text_config, self.config.vision_config
        dtypes = (self.dtype, self.param_dtype)
        options = (*dtypes, self.scan_layers, self.remat)
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.text_model = CLIPTextTransformer(text, *options[2:], **types)
        self.text_projection = projection(text, *dtypes)
        self.vision_model = CLIPVisionTransformer(vision, *options)
        self.visual_projection = projection(vision, *dtypes)
        self.logit_scale = self.param(
            "logit_scale", nn.initializers.constant(2.6592), (), self.param_dtype
        )

    def __call__(
        self, input_ids: Int[Array, "b l"], pixel_values: Float[Array, "n height width c"]
    ) -> tuple[Float[Array, "b joint"], Float[Array, "n joint"]]:
        text = self.text_projection(self.text_model(input_ids).pooler_output)
        image = self.visual_projection(self.vision_model(pixel_values).pooler_output)
        return tuple(x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (text, image))  # pyright: ignore[reportReturnType]
