"""The KL autoencoder of FLUX: pictures to latents 8 x smaller, and back.

Names and order follow diffusers' `AutoencoderKL` (black-forest-labs/flux `modules/autoencoder.py`
holds the same network). Pictures and latents are channels-last.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from fluxjax.config import AutoencoderConfig
from fluxjax.models.attention import dot_product_attention
from fluxjax.models.products import own_precision

Dtype = jnp.dtype | type


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents."""

    mean: Float[Array, "b *size c"]
    logvar: Float[Array, "b *size c"]

    def sample(self, key: PRNGKeyArray) -> Float[Array, "b *size c"]:
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise


def normalize_latents(
    latents: Float[Array | np.ndarray, "*shape"], config: AutoencoderConfig
) -> Float[Array | np.ndarray, "*shape"]:
    """From the autoencoder's latents to those that the transformer denoises."""
    return (latents - config.shift_factor) * config.scaling_factor


def denormalize_latents(
    latents: Float[Array, "*shape"], config: AutoencoderConfig
) -> Float[Array, "*shape"]:
    """Inverse of `normalize_latents`."""
    return latents / config.scaling_factor + config.shift_factor


class GroupNorm(nn.Module):
    """Group normalisation of pictures or clips, with float32 statistics over all of each."""

    groups: int
    dtype: Dtype
    param_dtype: Dtype
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "b *size c"]) -> Float[Array, "b *size c"]:
        *size, channels = x.shape[1:]
        scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        y = x.astype(jnp.float32)
        mean = self.group_mean(y)
        # Two passes: E[x^2] - E[x]^2 loses the digits that parity needs.
        var = self.group_mean(jnp.square(y - mean))
        # One multiply-add per pixel: the statistics are folded into the affine.
        shape = (*(1 for _ in size), channels)
        scale, bias = (v.astype(jnp.float32).reshape(shape) for v in (scale, bias))
        gain = jax.lax.rsqrt(var + self.epsilon) * scale[None]
        offset = bias[None] - mean * gain
        return (y * gain + offset).astype(self.dtype)

    def group_mean(self, values: Float[Array, "b *size c"]) -> Float[Array, "b *ones c"]:
        """Of each channel's group, for each channel."""
        b, *size, channels = values.shape
        # Over pixels first, with the channels innermost, then over the few in each group: a
        # reduction over (pixels, channels of a group) at once does not vectorise.
        means = values.mean(tuple(range(1, values.ndim - 1))).reshape(b, self.groups, -1).mean(-1)
        each = jnp.repeat(means, channels // self.groups, axis=1)
        return each.reshape(b, *(1 for _ in size), channels)


class Layer(nn.Module):
    """What layers of KL autoencoders share, of pictures and of clips: fields, and their leaves."""

    config: Any
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def norm(self, name: str | None) -> GroupNorm:
        return GroupNorm(self.config.norm_num_groups, self.dtype, self.param_dtype, name=name)

    def linear(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=own_precision(self.dtype),
            name=name,
        )

    def part(self, cls, *args, name: str):
        return cls(self.config, self.dtype, self.param_dtype, *args, name=name)


class _Layer(Layer):
    config: AutoencoderConfig

    def conv(
        self, features: int, size: int, name: str | None, *, stride: int = 1, padding=None
    ) -> nn.Conv:
        edge = size // 2
        return nn.Conv(
            features,
            (size, size),
            strides=stride,
            padding=padding or ((edge, edge), (edge, edge)),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=own_precision(self.dtype),
            name=name,
        )


class ResnetBlock(_Layer):
    """Norm, SiLU and convolution, twice, beside the input."""

    features: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        h = self.conv(self.features, 3, "conv1")(nn.silu(self.norm("norm1")(x)))
        h = self.conv(self.features, 3, "conv2")(nn.silu(self.norm("norm2")(h)))
        if x.shape[-1] != self.features:
            x = self.conv(self.features, 1, "conv_shortcut")(x)
        return x + h


class PixelAttention(_Layer):
    """Single-head attention over all pixels."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        tokens = self.norm("group_norm")(x).reshape(b, h * w, c)
        q, k, v = (self.linear(c, name)(tokens)[:, :, None] for name in ("to_q", "to_k", "to_v"))
        out = dot_product_attention(q, k, v)[:, :, 0]
        return x + self.linear(c, "to_out_0")(out).reshape(x.shape)


class MidBlock(_Layer):
    """Attention between two residual blocks, at the coarsest resolution."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        features = x.shape[-1]
        x = self.part(ResnetBlock, features, name="resnets_0")(x)
        x = self.part(PixelAttention, name="attentions_0")(x)
        return self.part(ResnetBlock, features, name="resnets_1")(x)


class Downsample(_Layer):
    """Half of each side, by a convolution."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        # Padded on the right and at the bottom only.
        return self.conv(x.shape[-1], 3, "conv", stride=2, padding=((0, 1), (0, 1)))(x)


class Upsample(_Layer):
    """Twice each side: the nearest pixel, then a convolution."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        b, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
        return self.conv(c, 3, "conv")(x.reshape(b, 2 * h, 2 * w, c))


class DownBlock(_Layer):
    """Residual blocks of one resolution of the encoder, and the way to the next."""

    features: int = 0
    downsample: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        for i in range(self.config.layers_per_block):
            x = self.part(ResnetBlock, self.features, name=f"resnets_{i}")(x)
        return self.part(Downsample, name="downsamplers_0")(x) if self.downsample else x


class UpBlock(_Layer):
    """Likewise of the decoder."""

    features: int = 0
    upsample: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        for i in range(self.config.layers_per_block + 1):
            x = self.part(ResnetBlock, self.features, name=f"resnets_{i}")(x)
        return self.part(Upsample, name="upsamplers_0")(x) if self.upsample else x


class Encoder(_Layer):
    """Pictures in [-1, 1] to the latents' moments."""

    @nn.compact
    def __call__(self, image: Float[Array, "b height width 3"]) -> Float[Array, "b h w moments"]:
        widths = self.config.block_out_channels
        x = self.conv(widths[0], 3, "conv_in")(image)
        for i, width in enumerate(widths):
            x = self.part(DownBlock, width, i < len(widths) - 1, name=f"down_blocks_{i}")(x)
        x = self.part(MidBlock, name="mid_block")(x)
        x = nn.silu(self.norm("conv_norm_out")(x))
        return self.conv(2 * self.config.latent_channels, 3, "conv_out")(x)


class Decoder(_Layer):
    """`middle` works at the size of the latents, `up` from there to the picture."""

    def setup(self) -> None:
        widths = self.config.block_out_channels[::-1]
        part = (self.config, self.dtype, self.param_dtype)
        self.conv_in = self.conv(widths[0], 3, None)
        self.mid_block = MidBlock(*part)
        self.up_blocks = [
            UpBlock(*part, width, i < len(widths) - 1) for i, width in enumerate(widths)
        ]
        self.conv_norm_out = self.norm(None)
        self.conv_out = self.conv(self.config.out_channels, 3, None)

    def middle(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        return self.mid_block(self.conv_in(latents))

    def up(self, x: Float[Array, "b h w d"]) -> Float[Array, "b height width 3"]:
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nn.silu(self.conv_norm_out(x)))

    def __call__(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b height width 3"]:
        return self.up(self.middle(latents))


class Autoencoder(nn.Module):
    """`encode` and `decode`; latents are unscaled, see `normalize_latents`.

    Source: diffusers `models/autoencoders/autoencoder_kl.py`.
    """

    config: AutoencoderConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype, self.param_dtype)
        self.decoder = Decoder(self.config, self.dtype, self.param_dtype)
        channels = self.config.latent_channels
        pointwise = partial(
            nn.Conv,
            kernel_size=(1, 1),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=own_precision(self.dtype),
        )
        if self.config.use_quant_conv:
            self.quant_conv = pointwise(2 * channels)
        if self.config.use_post_quant_conv:
            self.post_quant_conv = pointwise(channels)

    def encode(self, image: Float[Array, "b height width 3"]) -> Posterior:
        """Pictures in [-1, 1], sides a multiple of `config.scale`, to a Gaussian over latents."""
        moments = self.encoder(image.astype(self.dtype))
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b height width 3"]:
        """Latents to pictures, nominally in [-1, 1] and not clamped."""
        return self.decoder(self._post_quant(latents))

    def decode_middle(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """The part of `decode` that works at the size of the latents."""
        return self.decoder.middle(self._post_quant(latents))

    def decode_up(self, features: Float[Array, "b h w d"]) -> Float[Array, "b height width 3"]:
        """The rest of `decode`."""
        return self.decoder.up(features)

    def _post_quant(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        latents = latents.astype(self.dtype)
        return self.post_quant_conv(latents) if self.config.use_post_quant_conv else latents

    def __call__(self, image: Float[Array, "b height width 3"]) -> Float[Array, "b height width 3"]:
        """The reconstruction from the posterior mean; touches every parameter."""
        return self.decode(self.encode(image).mean)
