"""ControlNets of FLUX.1: blocks that see a control picture and add to the transformer's tokens.

Source: diffusers `controlnets/controlnet_flux.py`; XLabs' `ControlNetFlux`, whose control pictures
pass convolutions and not the autoencoder.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from fluxjax.config import ConfigError, ControlNetConfig
from fluxjax.models.dense import COLLECTION, Dense, Part
from fluxjax.models.embeddings import Rope
from fluxjax.models.flux import FluxTrunk, Modulations
from fluxjax.models.flux_blocks import NOTHING, UNMARKED, DoubleBlock, SingleBlock
from fluxjax.models.latents import pack
from fluxjax.models.products import own_precision
from fluxjax.models.repeated_blocks import run

_zeros = nn.initializers.zeros_init()
HINT_CHANNELS = 16


class ControlSamples(NamedTuple):
    """What is added to the picture's tokens, see `fluxjax.models.flux.spread`; None for none."""

    double: Float[Array, "layers b image d"] | None
    single: Float[Array, "single_layers b image d"] | None


class KeptDoubleBlock(DoubleBlock):
    """Keeps the picture's tokens for a sample."""

    def __call__(self, streams, modulation, rope, *added):
        streams, _ = super().__call__(streams, modulation, rope, *added)
        return streams, streams[0]


class KeptSingleBlock(SingleBlock):
    """Keeps the joint sequence for a sample."""

    def __call__(self, x, modulation, rope, *added):
        x, _ = super().__call__(x, modulation, rope, *added)
        return x, x


class HintBlock(Part):
    """A control picture's pixels at an eighth of its size, as latents are."""

    channels: int

    def setup(self) -> None:
        self.conv_in = self._conv(HINT_CHANNELS, 1)
        self.blocks = [self._conv(HINT_CHANNELS, 1 + i % 2) for i in range(6)]
        self.conv_out = self._conv(self.channels, 1, kernel_init=_zeros)

    def _conv(self, features: int, stride: int, **options: Any) -> nn.Conv:
        return nn.Conv(
            features,
            (3, 3),
            (stride, stride),
            padding=((1, 1), (1, 1)),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=own_precision(self.dtype),
            **options,
        )

    def __call__(
        self, picture: Float[Array, "b height width 3"]
    ) -> Float[Array, "b rows columns c"]:
        x = nn.silu(self.conv_in(picture))
        for block in self.blocks:
            x = nn.silu(block(x))
        return self.conv_out(x)


class FluxControlNet(FluxTrunk):
    """Samples for the transformer's blocks. `embed_control` and `embed_text` are done once."""

    config: ControlNetConfig
    double_block = KeptDoubleBlock
    single_block = KeptSingleBlock

    def setup(self) -> None:
        super().setup()
        config = self.config
        self.controlnet_blocks = self._ends(config.num_layers)
        self.controlnet_single_blocks = self._ends(config.num_single_layers)
        if config.num_mode:
            init = nn.initializers.normal(0.02)
            self.controlnet_mode_embedder = nn.Embed(
                config.num_mode, config.inner_dim, self.dtype, self.param_dtype, init
            )
        self.controlnet_x_embedder = self.dense(config.inner_dim, kernel_init=_zeros)
        if config.sees_pixels:
            self.input_hint_block = HintBlock(config.conditioning_embedding_channels, **self.types)

    def _ends(self, count: int) -> Any:
        options = {"kernel_init": _zeros, **self.types}
        if not self.scan_layers or count == 0:
            return [Dense(self.config.inner_dim, **options) for _ in range(count)]
        mapped = nn.vmap(
            Dense, variable_axes={"params": 0, COLLECTION: 0}, split_rngs={"params": True}
        )
        return mapped(self.config.inner_dim, **options)

    def _end(
        self, ends: Any, kept: Float[Array, "layers b image d"] | None
    ) -> Float[Array, "layers b image d"] | None:
        if kept is None:
            return None
        if self.scan_layers:
            return ends(kept)
        return jnp.stack([end(x) for end, x in zip(ends, kept, strict=True)])

    def embed_control(
        self, control: Float[Array, "b image in_channels"] | Float[Array, "b height width 3"]
    ) -> Float[Array, "b image d"]:
        """The control picture in the width of the blocks: packed latents, or pixels in [-1, 1].

        Raises ConfigError for the other of the two.
        """
        if (control.ndim == 4) != self.config.sees_pixels:
            wanted = "pixels" if self.config.sees_pixels else "packed latents"
            raise ConfigError(
                f"this ControlNet takes a control picture as {wanted}, got {list(control.shape)}"
            )
        if not self.config.sees_pixels:
            return self.controlnet_x_embedder(control)
        tokens: Any = pack(jnp.moveaxis(self.input_hint_block(control), -1, 1))
        return self.controlnet_x_embedder(tokens)

    def embed_text(
        self,
        encoder_hidden_states: Float[Array, "b text joint"],
        mode: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b text_and_mode d"]:
        """T5 states in the width of the blocks, after the token of `mode` in a union network."""
        text = self.context_embedder(encoder_hidden_states)
        if not self.config.num_mode:
            return text
        if mode is None:
            raise ConfigError("a union ControlNet needs a mode, the kind of control picture")
        token = self.controlnet_mode_embedder(mode)[:, None].astype(text.dtype)
        return jnp.concatenate([token, text], axis=1)

    def rope(self, txt_ids: Num[Array, "text axes"], img_ids: Num[Array, "image axes"]) -> Rope:
        """Rotary tables; the mode's token stands where the first of text does."""
        if self.config.num_mode:
            txt_ids = jnp.concatenate([txt_ids[:1], txt_ids])
        return super().rope(txt_ids, img_ids)

    def samples(
        self,
        hidden_states: Float[Array, "b image in_channels"],
        control: Float[Array, "b image d"],
        text: Float[Array, "b text d"],
        modulations: Modulations,
        rope: Rope,
    ) -> ControlSamples:
        """One step, given what `embed_control`, `embed_text`, `modulations` and `rope` return."""
        image = self.x_embedder(hidden_states) + control
        streams, double = run(
            self.transformer_blocks,
            (image, text),
            (modulations.image, modulations.text),
            rope,
            NOTHING,
            None,
            UNMARKED,
        )
        image, text = streams
        joint = jnp.concatenate([text, image], axis=1)
        blocks = self.single_transformer_blocks
        _, single = run(blocks, joint, modulations.single, rope, NOTHING, None, UNMARKED)
        if single is not None:
            single = single[:, :, text.shape[1] :]
        return ControlSamples(
            self._end(self.controlnet_blocks, double),
            self._end(self.controlnet_single_blocks, single),
        )

    def __call__(
        self,
        hidden_states: Float[Array, "b image in_channels"],
        controlnet_cond: Float[Array, "b image in_channels"] | Float[Array, "b height width 3"],
        encoder_hidden_states: Float[Array, "b text joint"],
        pooled_projections: Float[Array, "b pooled"],
        timestep: Float[Array, " b"],
        img_ids: Num[Array, "image axes"],
        txt_ids: Num[Array, "text axes"],
        guidance: Float[Array, " b"] | None = None,
        controlnet_mode: Int[Array, " b"] | None = None,
    ) -> ControlSamples:
        """`timestep` is the noise level in [0, 1]; `controlnet_mode` is for union networks."""
        return self.samples(
            hidden_states,
            self.embed_control(controlnet_cond),
            self.embed_text(encoder_hidden_states, controlnet_mode),
            self.modulations(timestep, pooled_projections, guidance),
            self.rope(txt_ids, img_ids),
        )
