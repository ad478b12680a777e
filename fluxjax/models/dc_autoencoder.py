"""The deep-compression autoencoder of clips (DC-AE) of Open-Sora 2.0: 4 x 32 x 32 to one latent.

Names and order follow Open-Sora's `opensora/models/dc_ae` (MIT Han Lab's efficientvit, made three
dimensional). Clips and latents are channels-last: (batch, frames, rows, columns, channels). Nothing
is causal; a single frame is a picture and stays one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fluxjax.config import DCAutoencoderConfig
from fluxjax.models.autoencoder import Dtype
from fluxjax.models.products import own_precision


def averaged(
    x: Float[Array, "b t h w c"], features: int, frames: int, pixels: int
) -> Float[Array, "b t2 h2 w2 d"]:
    """Blocks of frames x pixels x pixels become channels, of which each `features` are means."""
    b, t, h, w, c = x.shape
    x = x.reshape(b, t // frames, frames, h // pixels, pixels, w // pixels, pixels, c)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(*x.shape[:4], features, -1).mean(-1)


def repeated(
    x: Float[Array, "b t h w c"], features: int, frames: int, pixels: int
) -> Float[Array, "b t2 h2 w2 d"]:
    """The way back: channels, each repeated, become blocks of frames x pixels x pixels."""
    b, t, h, w, c = x.shape
    x = jnp.repeat(x, features * frames * pixels**2 // c, axis=-1)
    x = x.reshape(b, t, h, w, features, frames, pixels, pixels)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, t * frames, h * pixels, w * pixels, features)


class BiasedRMSNorm(nn.Module):
    """Over the channels, with a bias; statistics in float32."""

    dtype: Dtype
    param_dtype: Dtype
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        one = (1, 1, 1, 1, x.shape[-1])
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        scale, bias = (value.astype(self.dtype).reshape(one) for value in (scale, bias))
        return y.astype(self.dtype) * scale + bias


class _Layer(nn.Module):
    """Fields shared by the networks below, and their leaves."""

    config: DCAutoencoderConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def conv(
        self, features: int, size: int, name: str, strides: int | tuple = 1, **options: Any
    ) -> nn.Conv:
        """Zeros lie beyond the edges, also where it strides."""
        return nn.Conv(
            features,
            (size,) * 3,
            strides=strides,
            padding=((size // 2, size // 2),) * 3,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=own_precision(self.dtype),
            name=name,
            **options,
        )

    def norm(self, name: str) -> BiasedRMSNorm:
        return BiasedRMSNorm(self.dtype, self.param_dtype, name=name)

    def part(self, cls, *args, name: str):
        return cls(self.config, self.dtype, self.param_dtype, *args, name=name)


class ConvLayer(_Layer):
    """A convolution with a bias, or with a norm after it."""

    features: int = 0
    size: int = 3
    normed: bool = False
    depthwise: bool = False
    strides: tuple[int, int, int] = (1, 1, 1)

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 d"]:
        options: dict[str, Any] = {"use_bias": not self.normed}
        if self.depthwise:
            options["feature_group_count"] = self.features
        x = self.conv(self.features, self.size, "conv", self.strides, **options)(x)
        return self.norm("norm")(x) if self.normed else x


class Residual(_Layer):
    """`x + main(x)`; `main` is a layer that is given the channels."""

    main: Callable[..., nn.Module] = ConvLayer

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        return x + self.part(self.main, x.shape[-1], name="main")(x)


class Convolutions(_Layer):
    """Two convolutions, of which the second has a norm."""

    features: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        x = nn.silu(self.part(ConvLayer, self.features, name="conv1")(x))
        return self.part(ConvLayer, self.features, 3, True, name="conv2")(x)


class LinearAttention(_Layer):
    """Over all places of all frames: relu(q) (relu(k)^T [v 1]), with heads twice, as projected and
    after a look at the neighbours."""

    features: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        b, t, h, w, c = x.shape
        size = self.config.attention_head_dim
        heads = c // size
        project = partial(self.conv, 3 * c, use_bias=False)
        qkv = self.part(_Projection, 3 * c, name="qkv")(x)
        near = project(5, "aggreg_0_0", feature_group_count=3 * c)(qkv)
        near = project(1, "aggreg_0_1", feature_group_count=3 * heads)(near)
        # The channels of each head are its q, k and v.
        both = jnp.concatenate([qkv, near], axis=-1).reshape(b, t * h * w, 2 * heads, 3, size)
        q, k, v = (both[:, :, :, i] for i in range(3))
        q, k = nn.relu(q), nn.relu(k)
        einsum = partial(
            jnp.einsum, precision=own_precision(x.dtype), preferred_element_type=jnp.float32
        )
        sums = einsum("bnhk,bnhv->bhkv", k, v), jnp.sum(k, axis=1, dtype=jnp.float32)
        q = q.astype(jnp.float32)
        out = jnp.einsum("bnhk,bhkv->bnhv", q, sums[0], precision=own_precision(q.dtype))
        total = jnp.einsum("bnhk,bhk->bnh", q, sums[1], precision=own_precision(q.dtype))
        out = (out / (total + 1e-15)[..., None]).astype(self.dtype)
        return self.part(ConvLayer, c, 1, True, name="proj")(out.reshape(b, t, h, w, 2 * c))


class _Projection(_Layer):
    """A convolution of one place without bias or norm."""

    features: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w d"]:
        return self.conv(self.features, 1, "conv", use_bias=False)(x)


class GatedConvolutions(_Layer):
    """Four times as wide inside, twice: values and their gates."""

    features: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        wide = 8 * self.features
        x = nn.silu(self.part(ConvLayer, wide, 1, name="inverted_conv")(x))
        x = self.part(ConvLayer, wide, 3, False, True, name="depth_conv")(x)
        values, gates = jnp.split(x, 2, axis=-1)
        x = values * nn.silu(gates)
        return self.part(ConvLayer, self.features, 1, True, name="point_conv")(x)


class AttentionBlock(_Layer):
    """EfficientViT's: linear attention, then gated convolutions."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        x = self.part(Residual, LinearAttention, name="context_module")(x)
        return self.part(Residual, GatedConvolutions, name="local_module")(x)


class Downsample(_Layer):
    """Half of each side, and of the frames of clips, beside averages of what becomes one."""

    features: int = 0
    frames: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 d"]:
        frames = self.frames if x.shape[1] > 1 else 1
        strides = (self.frames, 2, 2)
        main = self.part(ConvLayer, self.features, 3, False, False, strides, name="main")
        return main(x) + averaged(x, self.features, frames, 2)


class Nearest(_Layer):
    """The nearest pixels, then a convolution."""

    features: int = 0
    frames: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 d"]:
        for axis, times in ((1, self.frames), (2, 2), (3, 2)):
            x = jnp.repeat(x, times, axis=axis)
        return self.part(ConvLayer, self.features, name="conv")(x)


class Upsample(_Layer):
    """Twice each side, and the frames of clips, beside what is repeated."""

    features: int = 0
    frames: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 d"]:
        frames = self.frames if x.shape[1] > 1 else 1
        main = self.part(Nearest, self.features, frames, name="main")
        return main(x) + repeated(x, self.features, frames, 2)


class Stage(_Layer):
    """Blocks of the stage `index`, and before or after them the change of size."""

    index: int = 0
    decoding: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 d"]:
        config, last = self.config, self.index == len(self.config.width_list) - 1
        frames = 2 if self.index in config.temporal_stages else 1
        depths = config.decoder_depth_list if self.decoding else config.encoder_depth_list
        names = iter(f"op_list_{i}" for i in range(depths[self.index] + 1))
        if self.decoding and not last:
            x = self.part(Upsample, config.width_list[self.index], frames, name=next(names))(x)
        for _ in range(depths[self.index]):
            if self.index >= config.first_attention_stage:
                x = self.part(AttentionBlock, name=next(names))(x)
            else:
                x = self.part(Residual, Convolutions, name=next(names))(x)
        if not self.decoding and not last:
            width = config.width_list[self.index + 1]
            x = self.part(Downsample, width, frames, name=next(names))(x)
        return x


class _LatentsOut(_Layer):
    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w d"]:
        return self.part(ConvLayer, self.config.latent_channels, name="op_list_0")(x)


class EncoderEnd(_Layer):
    """To the latents, beside averages of channels."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w d"]:
        main = self.part(_LatentsOut, name="main")
        return main(x) + averaged(x, self.config.latent_channels, 1, 1)


class Encoder(_Layer):
    """Clips in [-1, 1] to latents."""

    @nn.compact
    def __call__(self, clip: Float[Array, "b frames height width 3"]) -> Float[Array, "b t h w c"]:
        x = self.part(ConvLayer, self.config.width_list[0], name="project_in")(clip)
        for i in range(len(self.config.width_list)):
            x = self.part(Stage, i, name=f"stages_{i}")(x)
        return self.part(EncoderEnd, name="project_out")(x)


class DecoderStart(_Layer):
    """From the latents, beside repeated channels."""

    @nn.compact
    def __call__(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b t h w d"]:
        width = self.config.width_list[-1]
        return self.part(ConvLayer, width, name="main")(latents) + repeated(latents, width, 1, 1)


class DecoderEnd(_Layer):
    """Norm, ReLU and the last convolution."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w 3"]:
        x = nn.relu(self.norm("op_list_0")(x))
        return self.part(ConvLayer, self.config.in_channels, name="op_list_2")(x)


class Decoder(_Layer):
    """Latents to clips, nominally in [-1, 1]."""

    @nn.compact
    def __call__(
        self, latents: Float[Array, "b t h w c"]
    ) -> Float[Array, "b frames height width 3"]:
        x = self.part(DecoderStart, name="project_in")(latents)
        for i in reversed(range(len(self.config.width_list))):
            x = self.part(Stage, i, True, name=f"stages_{i}")(x)
        return self.part(DecoderEnd, name="project_out")(x)


class DCAutoencoder(nn.Module):
    """`encode` and `decode`; latents are unscaled, see `config.latent_factor`.

    Source: hpcaitech/Open-Sora `opensora/models/dc_ae/models/dc_ae.py`; long and large clips go
    through `models.video_tiles`.
    """

    config: DCAutoencoderConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype, self.param_dtype)
        self.decoder = Decoder(self.config, self.dtype, self.param_dtype)

    def encode(self, clip: Float[Array, "b frames height width 3"]) -> Float[Array, "b t h w c"]:
        """Clips in [-1, 1] to latents; there is nothing random in them.

        Sides and frames are multiples of the ratios, or there is a single frame.
        """
        return self.encoder(clip.astype(self.dtype))

    def encode_tile(
        self, clip: Float[Array, "b frames height width 3"]
    ) -> Float[Array, "b t h w c"]:
        """Of tiles, it is the latents that are blended."""
        return self.encode(clip)

    def decode(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b frames height width 3"]:
        """Latents to clips, nominally in [-1, 1] and not clamped."""
        return self.decoder(latents.astype(self.dtype))

    def __call__(
        self, clip: Float[Array, "b frames height width 3"]
    ) -> Float[Array, "b frames height width 3"]:
        """The reconstruction; touches every parameter."""
        return self.decode(self.encode(clip))
