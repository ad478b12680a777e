"""The causal 3-D KL autoencoder of HunyuanVideo and Open-Sora 2.0: clips to latents and back.

Names and order follow diffusers' `AutoencoderKLHunyuanVideo`; the original codes have the same
names. Clips and latents are channels-last: (batch, frames, rows, columns, channels). Convolutions
see no later frame, the attention in the middle none either; group norms, which average over all
frames, do.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fluxjax.config import CausalAutoencoderConfig
from fluxjax.models.attention import dot_product_attention
from fluxjax.models.autoencoder import Layer, Posterior
from fluxjax.models.clip_convolution import convolve_clips
from fluxjax.models.products import own_precision


class _Layer(Layer):
    config: CausalAutoencoderConfig


class CausalConv(_Layer):
    """A convolution over the same place and frame, their neighbours and the two frames before.

    Beyond the edges lies what is at the edge, before the first frame the first frame.
    """

    features: int = 0
    size: int = 3
    strides: tuple[int, int] = (1, 1)
    """Of frames, and of rows and columns."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 d"]:
        frames, pixels = self.strides
        edge, earlier = self.size // 2, self.size - 1
        x = jnp.pad(x, ((0, 0), (earlier, 0), (edge, edge), (edge, edge), (0, 0)), "edge")
        return nn.Conv(
            self.features,
            (self.size,) * 3,
            strides=(frames, pixels, pixels),
            padding="VALID",
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=own_precision(self.dtype),
            conv_general_dilated=convolve_clips,
            name="conv",
        )(x)


class ResnetBlock(_Layer):
    """Norm, SiLU and causal convolution, twice, beside the input."""

    features: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w d"]:
        h = nn.silu(self.norm("norm1")(x))
        h = self.part(CausalConv, self.features, name="conv1")(h)
        h = nn.silu(self.norm("norm2")(h))
        h = self.part(CausalConv, self.features, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = self.part(CausalConv, self.features, 1, name="conv_shortcut")(x)
        return x + h


class CausalAttention(_Layer):
    """Single-head attention in which a place sees all places of its own and earlier frames."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        b, t, h, w, c = x.shape
        tokens = self.norm("group_norm")(x).reshape(b, t * h * w, c)
        q, k, v = (self.linear(c, name)(tokens)[:, :, None] for name in ("to_q", "to_k", "to_v"))

        def one_frame(queries_and_seen):
            queries, seen = queries_and_seen
            return dot_product_attention(queries, k, v, key_lengths=jnp.full(b, seen))

        # Frame after frame, so that neither the mask nor all logits exist at once.
        queries = jnp.moveaxis(q.reshape(b, t, h * w, 1, c), 1, 0)
        seen = (jnp.arange(t) + 1) * (h * w)
        out = jnp.moveaxis(jax.lax.map(one_frame, (queries, seen)), 0, 1)
        return x + self.linear(c, "to_out_0")(out.reshape(b, t * h * w, c)).reshape(x.shape)


class MidBlock(_Layer):
    """Attention between two residual blocks, at the coarsest resolution."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        features = x.shape[-1]
        x = self.part(ResnetBlock, features, name="resnets_0")(x)
        x = self.part(CausalAttention, name="attentions_0")(x)
        return self.part(ResnetBlock, features, name="resnets_1")(x)


class Downsample(_Layer):
    """By `factors` of frames and of sides, by a convolution."""

    factors: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 c"]:
        return self.part(CausalConv, x.shape[-1], 3, self.factors, name="conv")(x)


class Upsample(_Layer):
    """By `factors` of frames, of which the first stays one, and of sides."""

    factors: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 c"]:
        frames, pixels = self.factors
        # The first frame stays one.
        later = jnp.repeat(x[:, 1:], frames, axis=1)
        x = jnp.concatenate([x[:, :1], later], axis=1)
        x = jnp.repeat(jnp.repeat(x, pixels, axis=2), pixels, axis=3)
        return self.part(CausalConv, x.shape[-1], name="conv")(x)


class DownBlock(_Layer):
    """Residual blocks of one resolution of the encoder, and the way to the next."""

    features: int = 0
    factors: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 d"]:
        for i in range(self.config.layers_per_block):
            x = self.part(ResnetBlock, self.features, name=f"resnets_{i}")(x)
        if self.factors != (1, 1):
            x = self.part(Downsample, self.factors, name="downsamplers_0")(x)
        return x


class UpBlock(_Layer):
    """Likewise of the decoder."""

    features: int = 0
    factors: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 d"]:
        for i in range(self.config.layers_per_block + 1):
            x = self.part(ResnetBlock, self.features, name=f"resnets_{i}")(x)
        if self.factors != (1, 1):
            x = self.part(Upsample, self.factors, name="upsamplers_0")(x)
        return x


class Encoder(_Layer):
    """Clips in [-1, 1] to the latents' moments."""

    @nn.compact
    def __call__(self, clip: Float[Array, "b frames height width 3"]) -> Float[Array, "b t h w m"]:
        widths = self.config.block_out_channels
        x = self.part(CausalConv, widths[0], name="conv_in")(clip)
        for i, (width, factors) in enumerate(
            zip(widths, (*self.config.factors, (1, 1)), strict=True)
        ):
            x = self.part(DownBlock, width, factors, name=f"down_blocks_{i}")(x)
        x = self.part(MidBlock, name="mid_block")(x)
        x = nn.silu(self.norm("conv_norm_out")(x))
        return self.part(CausalConv, 2 * self.config.latent_channels, name="conv_out")(x)


class Decoder(_Layer):
    """Latents to clips, nominally in [-1, 1]."""

    @nn.compact
    def __call__(
        self, latents: Float[Array, "b t h w c"]
    ) -> Float[Array, "b frames height width 3"]:
        widths = self.config.block_out_channels[::-1]
        x = self.part(CausalConv, widths[0], name="conv_in")(latents)
        x = self.part(MidBlock, name="mid_block")(x)
        # Rows, columns and frames grow at the same places, counted from the start, as they shrink.
        for i, (width, factors) in enumerate(
            zip(widths, (*self.config.factors, (1, 1)), strict=True)
        ):
            x = self.part(UpBlock, width, factors, name=f"up_blocks_{i}")(x)
        x = nn.silu(self.norm("conv_norm_out")(x))
        return self.part(CausalConv, self.config.out_channels, name="conv_out")(x)


def posterior(moments: Float[Array | np.ndarray, "b t h w moments"]) -> Posterior:
    """Means and log variances, one after the other along the channels, as a Gaussian."""
    mean, logvar = jnp.split(jnp.asarray(moments), 2, axis=-1)
    return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))


class CausalAutoencoder(nn.Module):
    """`encode` and `decode`; latents are unscaled, see `config.latent_factor`.

    Source: diffusers `models/autoencoders/autoencoder_kl_hunyuan_video.py`; long and large clips go
    through `models.video_tiles`.
    """

    config: CausalAutoencoderConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        types = self.dtype, self.param_dtype
        self.encoder = Encoder(self.config, *types)
        self.decoder = Decoder(self.config, *types)
        channels = self.config.latent_channels
        self.quant_conv = self._pointwise(2 * channels)
        self.post_quant_conv = self._pointwise(channels)

    def _pointwise(self, features: int) -> nn.Conv:
        return nn.Conv(
            features,
            (1, 1, 1),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=own_precision(self.dtype),
        )

    def encode_tile(
        self, clip: Float[Array, "b frames height width 3"]
    ) -> Float[Array, "b t h w moments"]:
        """What `posterior` reads: of tiles, it is this that is blended."""
        return self.quant_conv(self.encoder(clip.astype(self.dtype)))

    def encode(self, clip: Float[Array, "b frames height width 3"]) -> Posterior:
        """Clips in [-1, 1] to a Gaussian over latents.

        Sides are multiples of the spatial, frames 1 + a multiple of the temporal ratio.
        """
        return posterior(self.encode_tile(clip))

    def decode(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b frames height width 3"]:
        """Latents to clips, nominally in [-1, 1] and not clamped."""
        return self.decoder(self.post_quant_conv(latents.astype(self.dtype)))

    def __call__(
        self, clip: Float[Array, "b frames height width 3"]
    ) -> Float[Array, "b frames height width 3"]:
        """The reconstruction from the posterior mean; touches every parameter."""
        return self.decode(self.encode(clip).mean)
