"""The FLUX transformer (MMDiT), after BFL's `model.py` and diffusers' `transformer_flux.py`.

`FluxTransformer.__call__` is one forward. A sampler that runs many steps on one prompt does the
step-invariant work once instead, inside its one jitted program:

    model = FluxTransformer(config)
    def method(name, *args):
        return model.apply({"params": params}, *args, method=name)

    rope = method("rope", txt_ids, img_ids)                              # once
    text = method("embed_text", encoder_hidden_states)                   # once
    modulations = method("step_modulations", timesteps, pooled, guidance)  # all steps at once
    def step(latents, inputs):
        modulation, delta = inputs
        velocity = method("denoise", latents, text, modulation, rope)
        return latents + delta * velocity, None
    latents, _ = jax.lax.scan(step, noise, (modulations, sigmas[1:] - sigmas[:-1]))

`timesteps` are sigmas in [0, 1], shape (steps,). The result equals `__call__` at each step.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from fluxjax.config import FluxConfig
from fluxjax.config.choices import Remat
from fluxjax.models.attention import AttentionKind
from fluxjax.models.dense import Part
from fluxjax.models.embeddings import Rope, TimestepRounding, TimeTextEmbed, rope_table
from fluxjax.models.flux_blocks import (
    UNMARKED,
    Additions,
    DoubleBlock,
    Marks,
    Samples,
    SingleBlock,
)
from fluxjax.models.repeated_blocks import by_steps, modulations_of, repeated, run
from fluxjax.models.transformer_blocks import AdaLayerNorm, ImagePrompt, joined, places


class Modulations(NamedTuple):
    """Shifts, scales and gates of every block; `step_modulations` adds a leading axis of steps."""

    image: Float[Array, "*steps layers b 6 d"] | None
    text: Float[Array, "*steps layers b 6 d"] | None
    single: Float[Array, "*steps single_layers b 3 d"] | None
    out: Float[Array, "*steps b 2 d"] | None


class Guides(NamedTuple):
    """What is added to the picture's tokens inside: by ControlNets, by IP-Adapters.

    Samples are spread over the blocks as `spread` says.
    """

    double: Samples | None = None
    single: Samples | None = None
    double_index: Int[Array | np.ndarray, "layers"] | None = None
    single_index: Int[Array | np.ndarray, "single_layers"] | None = None
    prompts: tuple[ImagePrompt, ...] = ()


UNGUIDED = Guides()


def spread(samples: int, blocks: int, *, repeat: bool = False) -> Int[np.ndarray, " blocks"]:
    """Which of the samples each block takes: stretches of equal length, so that with 6
    for 19 blocks (4 each) the last is never used; or with `repeat` in turn, as XLabs' do.

    Source: diffusers `FluxTransformer2DModel`.
    """
    block = np.arange(blocks, dtype=np.int32)
    return block % samples if repeat else block // np.int32(-(-blocks // samples))


class FluxTrunk(Part):
    """What the transformer and its ControlNets have in common: embedders and blocks.

    `scan_layers` and `remat`: see `fluxjax.models.repeated_blocks`. `timestep_rounding`: see
    `embeddings.TimeTextEmbed`.
    """

    text_last: ClassVar[bool] = False
    """Whether the text follows the image in the joint sequence."""

    config: FluxConfig
    scan_layers: bool = False
    remat: Remat = "none"
    timestep_rounding: TimestepRounding | None = "diffusers"
    attention: AttentionKind = "auto"

    double_block: ClassVar[type[DoubleBlock]] = DoubleBlock
    single_block: ClassVar[type[SingleBlock]] = SingleBlock

    def setup(self) -> None:
        config = self.config
        self.time_text_embed = TimeTextEmbed(
            config.inner_dim, config.guidance_embeds, self.timestep_rounding, **self.types
        )
        self.context_embedder = self._context_embedder()
        self.x_embedder = self._x_embedder()
        self.transformer_blocks = self._blocks(self.double_block, config.num_layers)
        self.single_transformer_blocks = self._blocks(self.single_block, config.num_single_layers)

    def _context_embedder(self) -> Any:
        return self.dense(self.config.inner_dim, kernel_init=nn.initializers.normal(0.02))

    def _x_embedder(self) -> Any:
        return self.dense(self.config.inner_dim, kernel_init=nn.initializers.normal(0.02))

    def _blocks(self, block: type, count: int) -> Any:
        def build(cls: Any) -> nn.Module:
            return cls(self.config, self.attention, **self.types)

        return repeated(block, build, count, scan=self.scan_layers, remat=self.remat)

    def rope(self, txt_ids: Num[Array, "text axes"], img_ids: Num[Array, "image axes"]) -> Rope:
        """Rotary tables of the joint sequence."""
        ids = jnp.concatenate(joined(txt_ids, img_ids, self.text_last), axis=0)
        return rope_table(ids, self.config.axes_dims_rope, self.config.rope_theta)

    def embed_text(
        self, encoder_hidden_states: Float[Array, "b text joint"]
    ) -> Float[Array, "b text d"]:
        """T5 states in the transformer's width."""
        return self.context_embedder(encoder_hidden_states)

    def modulations(
        self,
        timestep: Float[Array, " b"],
        pooled_projections: Float[Array, "b pooled"],
        guidance: Float[Array, " b"] | None = None,
    ) -> Modulations:
        """Everything the blocks take from timestep, guidance and pooled text."""
        vector = self.time_text_embed(timestep, pooled_projections, guidance)
        image, text = modulations_of(self.transformer_blocks, vector) or (None, None)
        single = modulations_of(self.single_transformer_blocks, vector)
        return Modulations(image, text, single, self._modulate_out(vector))

    def _modulate_out(self, vector: Float[Array, "n d"]) -> Float[Array, "n 2 d"] | None:
        return None

    def step_modulations(
        self,
        timesteps: Float[Array, " steps"],
        pooled_projections: Float[Array, "b pooled"],
        guidance: Float[Array, " b"] | None = None,
    ) -> Modulations:
        """`modulations` of many steps in one pass over the weights; every leaf (steps, ...)."""
        steps, batch = timesteps.shape[0], pooled_projections.shape[0]
        flat = self.modulations(
            jnp.tile(timesteps, batch),
            jnp.repeat(pooled_projections, steps, axis=0),
            None if guidance is None else jnp.repeat(guidance, steps),
        )
        return by_steps(flat, steps)


class FluxVelocity(FluxTrunk):
    """The trunk and the last layer, which predict the velocity (noise - data) of packed latents."""

    def setup(self) -> None:
        super().setup()
        self.norm_out = AdaLayerNorm(self.config.inner_dim, 2, **self.types)
        zeros = nn.initializers.zeros_init()
        self.proj_out = self.dense(self.config.out_channels, kernel_init=zeros)

    def _modulate_out(self, vector: Float[Array, "n d"]) -> Float[Array, "n 2 d"] | None:
        return self.norm_out.modulation(vector)

    def velocity(
        self,
        image: Float[Array, "b image d"],
        text: Float[Array, "b text d"],
        modulations: Modulations,
        rope: Rope,
        guides: Guides = UNGUIDED,
        marks: Marks = UNMARKED,
    ) -> Float[Array, "b image out_channels"]:
        """Of embedded tokens, given what `embed_text`, `modulations` and `rope` return."""
        (image, text), _ = run(
            self.transformer_blocks,
            (image, text),
            (modulations.image, modulations.text),
            rope,
            Additions(guides.double_index, guides.prompts),
            guides.double,
            marks,
        )
        _, of_image = places(text.shape[1], image.shape[1], self.text_last)
        joint = jnp.concatenate(joined(text, image, self.text_last), axis=1)
        if marks.replaced is not None:
            none = jnp.zeros(text.shape[1], bool)
            of_joint = jnp.concatenate(joined(none, marks.replaced, self.text_last))
            marks = marks._replace(replaced=of_joint)
        joint, _ = run(
            self.single_transformer_blocks,
            joint,
            modulations.single,
            rope,
            Additions(guides.single_index),
            guides.single,
            marks,
        )
        assert modulations.out is not None
        # diffusers' order, (scale, shift); BFL stores (shift, scale) and conversion swaps them.
        scale, shift = modulations.out[:, 0], modulations.out[:, 1]
        return self.proj_out(self.norm_out(joint[:, of_image], shift, scale))


class FluxTransformer(FluxVelocity):
    """FLUX.1's."""

    def denoise(
        self,
        hidden_states: Float[Array, "b image in_channels"],
        text: Float[Array, "b text d"],
        modulations: Modulations,
        rope: Rope,
        guides: Guides = UNGUIDED,
    ) -> Float[Array, "b image out_channels"]:
        """One step, given what `embed_text`, `modulations` and `rope` return."""
        return self.velocity(self.x_embedder(hidden_states), text, modulations, rope, guides)

    def __call__(
        self,
        hidden_states: Float[Array, "b image in_channels"],
        encoder_hidden_states: Float[Array, "b text joint"],
        pooled_projections: Float[Array, "b pooled"],
        timestep: Float[Array, " b"],
        img_ids: Num[Array, "image axes"],
        txt_ids: Num[Array, "text axes"],
        guidance: Float[Array, " b"] | None = None,
        guides: Guides = UNGUIDED,
    ) -> Float[Array, "b image out_channels"]:
        """`timestep` is the noise level in [0, 1], 1 = pure noise; ids are unbatched."""
        return self.denoise(
            hidden_states,
            self.embed_text(encoder_hidden_states),
            self.modulations(timestep, pooled_projections, guidance),
            self.rope(txt_ids, img_ids),
            guides,
        )
