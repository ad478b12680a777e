"""The UNet of Stable Diffusion 1, 2 and XL: latents, a timestep and text to a prediction.

Names and order follow diffusers' `UNet2DConditionModel`; CompVis' `UNetModel` is the same network
under other names. Latents are channels-last.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from fluxjax.config.choices import Remat
from fluxjax.config.unet import UNetConfig
from fluxjax.models.autoencoder import GroupNorm
from fluxjax.models.convolution import convolution
from fluxjax.models.dense import Part
from fluxjax.models.embeddings import TwoLayerEmbedder, sinusoid
from fluxjax.models.repeated_blocks import rematerialised
from fluxjax.models.unet_blocks import Downsample, Resnet, SpatialTransformer, Upsample


class DownBlock(Part):
    """Residual blocks, each with a transformer where there is attention; then half the size."""

    config: UNetConfig
    level: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b t"], text: Float[Array, "b l d"]
    ) -> tuple[Array, list[Array]]:
        """The result, and what is handed over to the way up."""
        config, level, handed = self.config, self.level, []
        width = config.block_out_channels[level]
        for i in range(config.layers_per_block):
            x = Resnet(config=config, features=width, **self.types, name=f"resnets_{i}")(x, time)
            if config.down_block_types[level] == "CrossAttnDownBlock2D":
                name = f"attentions_{i}"
                x = SpatialTransformer(config=config, level=level, **self.types, name=name)(x, text)
            handed.append(x)
        if level < len(config.block_out_channels) - 1:
            x = Downsample(**self.types, name="downsamplers_0")(x)
            handed.append(x)
        return x, handed


class MidBlock(Part):
    """A transformer between two residual blocks, at the coarsest resolution."""

    config: UNetConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b t"], text: Float[Array, "b l d"]
    ) -> Float[Array, "b h w c"]:
        config, last = self.config, len(self.config.block_out_channels) - 1
        width = config.block_out_channels[last]
        x = Resnet(config=config, features=width, **self.types, name="resnets_0")(x, time)
        x = SpatialTransformer(config=config, level=last, **self.types, name="attentions_0")(
            x, text
        )
        return Resnet(config=config, features=width, **self.types, name="resnets_1")(x, time)


class UpBlock(Part):
    """As `DownBlock`, but each residual block also reads what the way down handed over."""

    config: UNetConfig
    level: int
    size: tuple[int, ...] | None
    """Of what comes next, rows and columns, which are odd where the latents' are."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        handed: list[Array],
        time: Float[Array, "b t"],
        text: Float[Array, "b l d"],
    ) -> Float[Array, "b h2 w2 c2"]:
        config, level = self.config, self.level
        kind = config.up_block_types[len(config.block_out_channels) - 1 - level]
        for i in range(config.layers_per_block + 1):
            x = jnp.concatenate([x, handed[-1 - i]], axis=-1)
            width = config.block_out_channels[level]
            x = Resnet(config=config, features=width, **self.types, name=f"resnets_{i}")(x, time)
            if kind == "CrossAttnUpBlock2D":
                name = f"attentions_{i}"
                x = SpatialTransformer(config=config, level=level, **self.types, name=name)(x, text)
        if self.size is not None:
            x = Upsample(**self.types, name="upsamplers_0")(x, self.size)
        return x


class GuidedTimeEmbedder(TwoLayerEmbedder):
    """With what is told of guidance added to the time beforehand."""

    inputs: int
    """Width of the time."""

    def setup(self) -> None:
        super().setup()
        self.cond_proj = self.dense(self.inputs, use_bias=False)

    def __call__(
        self, x: Float[Array, "b inputs"], told: Float[Array, "b told"]
    ) -> Float[Array, "b d"]:
        return super().__call__(x + self.cond_proj(told))


class UNet(Part):
    """Source: diffusers `models/unets/unet_2d_condition.py`; Rombach et al. 2022."""

    config: UNetConfig
    remat: Remat = "none"
    """See `fluxjax.models.repeated_blocks`; a block is a resolution on its way down or up."""

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timestep: Float[Array, " b"],
        encoder_hidden_states: Float[Array, "b l d"],
        text_embeds: Float[Array, "b pooled"] | None = None,
        time_ids: Float[Array, "b ids"] | None = None,
        timestep_cond: Float[Array, "b told"] | None = None,
    ) -> Float[Array, "b h w out"]:
        """The noise, or what else the model was trained to predict.

        Timesteps are those of training, 0 (clean) to 999, and may have fractions. Only models
        with `addition_embed_type` read `text_embeds`, the pooled text, and `time_ids`: height and
        width of the original, top and left of the crop, then height and width of the target or, in
        the refiner, an aesthetic score. Only models with `time_cond_proj_dim` read
        `timestep_cond`, the guidance scale (`embeddings.guidance_sinusoid`).
        """
        config, widths = self.config, self.config.block_out_channels
        x, text = sample.astype(self.dtype), encoder_hidden_states.astype(self.dtype)
        time = self._time(timestep, timestep_cond)
        if config.addition_embed_type is not None:
            if text_embeds is None or time_ids is None:
                raise ValueError("a UNet with an added embedding needs text_embeds and time_ids")
            time = time + self._added(text_embeds, time_ids)
        x = convolution(self, widths[0], 3, "conv_in")(x)
        handed = [x]
        down, middle, up = (
            rematerialised(block, self.remat) for block in (DownBlock, MidBlock, UpBlock)
        )
        for level in range(len(widths)):
            block = down(config=config, level=level, **self.types, name=f"down_blocks_{level}")
            x, more = block(x, time, text)
            handed += more
        x = middle(config=config, **self.types, name="mid_block")(x, time, text)
        for i, level in enumerate(reversed(range(len(widths)))):
            left = len(handed) - config.layers_per_block - 1
            handed, mine = handed[:left], handed[left:]
            size = handed[-1].shape[1:3] if handed else None
            block = up(config=config, level=level, size=size, **self.types, name=f"up_blocks_{i}")
            x = block(x, mine, time, text)
        types = jnp.dtype(self.dtype), jnp.dtype(self.param_dtype)
        norm = GroupNorm(config.norm_num_groups, *types, config.norm_eps, name="conv_norm_out")
        x = nn.silu(norm(x))
        return convolution(self, config.out_channels, 3, "conv_out")(x)

    def _time(
        self, timestep: Float[Array, " b"], told: Float[Array, "b told"] | None
    ) -> Float[Array, "b t"]:
        first = self.config.block_out_channels[0]
        time = sinusoid(timestep, first).astype(self.dtype)
        if self.config.time_cond_proj_dim is None:
            return TwoLayerEmbedder(4 * first, **self.types, name="time_embedding")(time)
        if told is None:
            raise ValueError("a UNet with time_cond_proj_dim needs timestep_cond")
        embedder = GuidedTimeEmbedder(4 * first, first, **self.types, name="time_embedding")
        return embedder(time, told.astype(self.dtype))

    def _added(
        self, text_embeds: Float[Array, "b pooled"], time_ids: Float[Array, "b ids"]
    ) -> Float[Array, "b t"]:
        config, rows = self.config, len(text_embeds)
        sizes = sinusoid(time_ids.reshape(-1), config.addition_time_embed_dim).reshape(rows, -1)
        joined = jnp.concatenate([text_embeds.astype(jnp.float32), sizes], axis=-1)
        width = 4 * config.block_out_channels[0]
        embedder = TwoLayerEmbedder(width, **self.types, name="add_embedding")
        return embedder(joined.astype(self.dtype))
