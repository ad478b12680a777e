"""Positions and scalars as vectors: rotary tables, sinusoids, and the conditioning embedder."""

from __future__ import annotations

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from fluxjax.models.dense import Part

TimestepRounding = Literal["diffusers", "bfl", "none"]

SINUSOID_DIM = 256


class Rope(NamedTuple):
    """Rotation per position and pair of channels, float32."""

    cos: Float[Array, "l half"]
    sin: Float[Array, "l half"]


def rope_table(ids: Num[Array, "l axes"], axes_dims: tuple[int, ...], theta: float) -> Rope:
    """Rotary tables of integer position ids, one group of channels per axis.

    As exact as diffusers' float64 tables rounded to float32 (`FluxPosEmbed`), without float64:
    each frequency is split into a part of 11 bits, whose product with a position below 8192 is
    exact in float32, and a small rest; the angle-sum identity joins the two.
    """
    cos, sin = [], []
    for axis, dim in enumerate(axes_dims):
        frequencies = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
        mantissa, exponent = np.frexp(frequencies)
        coarse = np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent)
        position = ids[:, axis, None].astype(jnp.float32)
        a = position * coarse.astype(np.float32)[None, :]
        b = position * (frequencies - coarse).astype(np.float32)[None, :]
        cos.append(jnp.cos(a) * jnp.cos(b) - jnp.sin(a) * jnp.sin(b))
        sin.append(jnp.sin(a) * jnp.cos(b) + jnp.cos(a) * jnp.sin(b))
    return Rope(jnp.concatenate(cos, axis=-1), jnp.concatenate(sin, axis=-1))


def apply_rope(x: Float[Array, "b l heads k"], rope: Rope) -> Float[Array, "b l heads k"]:
    """Rotate the interleaved pairs (2i, 2i + 1), in float32; the result has the dtype of `x`."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    cos, sin = rope.cos[None, :, None, :], rope.sin[None, :, None, :]
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def rotate_halves(x: Float[Array, "b l heads k"], rope: Rope) -> Float[Array, "b l heads k"]:
    """The same for pairs (i, i + k / 2), as transformers' language models have them."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rope.cos[None, :, None, :], rope.sin[None, :, None, :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def sinusoid(t: Float[Array, " b"], dim: int = SINUSOID_DIM) -> Float[Array, "b dim"]:
    """Cosines, then sines, of `t` at `dim / 2` frequencies from 1 down to 1/10000, in float32."""
    half = dim // 2
    # float32 exponents, as PyTorch has them: an ulp of a frequency, times 1000 t, is 1e-3.
    exponents = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    if half == 128:
        # PyTorch takes exp from MKL, whose last bit depends on the processor: AVX-512 rounds 13, 44
        # and 119 up, AVX2 moves six others. These are what it gives on AMD and without AVX.
        frequencies[[12, 106]] = np.nextafter(frequencies[[12, 106]], np.float32(1))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def guidance_sinusoid(scale: Float[Array, " b"], dim: int) -> Float[Array, "b dim"]:
    """Sines, then cosines, of 1000 (scale - 1) at `dim // 2` frequencies from 1 down to 1/10000,
    its ends among them, and a zero where `dim` is odd; in float32.

    Source: diffusers `get_guidance_scale_embedding`, of the scale as its pipelines have it.
    """
    half = dim // 2
    step = np.log(np.float32(10000.0)) / np.float32(half - 1)
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -step)
    angles = (1000.0 * (scale.astype(jnp.float32) - 1.0))[:, None] * frequencies[None, :]
    values = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(values, ((0, 0), (0, dim % 2)))


def sinusoids_2d(
    rows: int, columns: int, dim: int, *, base: int, scale: float = 1.0
) -> Float[Array, "n dim"]:
    """Positions of a grid, row by row, whatever its size spread over the range of `base` x `base`
    and divided by `scale`: the column in the first half of the channels, the row in the second,
    each as sines, then cosines, at dim / 4 frequencies from 1 down to 1/10000.

    Source: diffusers `get_2d_sincos_pos_embed`, whose angles are float64.
    """
    frequencies = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4))

    def axis(length: int) -> Array:
        index = np.arange(length, dtype=np.float32)
        position = index / np.float32(length / base) / np.float32(scale)
        angles = np.outer(position.astype(np.float64), frequencies)
        table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        return jnp.asarray(table.astype(np.float32))

    shape = (rows, columns, dim // 2)
    column, row = axis(columns)[None], axis(rows)[:, None]
    joined = [jnp.broadcast_to(table, shape) for table in (column, row)]
    return jnp.concatenate(joined, axis=-1).reshape(rows * columns, dim)


def round_to(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """Values of `dtype` held in float32.

    `reduce_precision` and not a pair of casts: XLA is free to drop the pair.
    """
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x.astype(jnp.float32), info.nexp, info.nmant)


def thousandfold(
    t: Float[Array, " b"], dtype: DTypeLike, rounding: TimestepRounding
) -> Float[Array, " b"]:
    """1000 t as BFL's code and diffusers see it when they run in `dtype`.

    `diffusers`: the pipeline casts 1000 t, divides by 1000, the transformer multiplies again.
    `bfl`: t itself is cast, then multiplied. `none`: exact. In bfloat16, 7 of the 28 default
    timesteps at 1024 x 1024 differ between the first two. In float32 all three agree closely.
    """
    if rounding == "none":
        return 1000.0 * t.astype(jnp.float32)
    if rounding == "diffusers":
        t = round_to(round_to(1000.0 * t.astype(jnp.float32), dtype) / 1000.0, dtype)
    return round_to(1000.0 * round_to(t, dtype), dtype)


class TwoLayerEmbedder(Part):
    """Linear, SiLU, Linear (BFL `MLPEmbedder`, diffusers `TimestepEmbedding`)."""

    dim: int

    def setup(self) -> None:
        init = nn.initializers.normal(0.02)
        self.linear_1 = self.dense(self.dim, kernel_init=init)
        self.linear_2 = self.dense(self.dim, kernel_init=init)

    def __call__(self, x: Float[Array, "b inputs"]) -> Float[Array, "b d"]:
        return self.linear_2(nn.silu(self.linear_1(x)))


class TimeTextEmbed(Part):
    """One vector from timestep, pooled text and, in distilled models, guidance.

    Without a `timestep_rounding` timesteps are those of training, 0 to 1000, and taken as they are.
    """

    dim: int
    guidance_embeds: bool
    timestep_rounding: TimestepRounding | None = "diffusers"

    def setup(self) -> None:
        self.timestep_embedder = TwoLayerEmbedder(self.dim, **self.types)
        if self.guidance_embeds:
            self.guidance_embedder = TwoLayerEmbedder(self.dim, **self.types)
        self.text_embedder = TwoLayerEmbedder(self.dim, **self.types)

    def __call__(
        self,
        timestep: Float[Array, " b"],
        pooled_projections: Float[Array, "b pooled"],
        guidance: Float[Array, " b"] | None = None,
        *,
        guided: bool = True,
    ) -> Float[Array, "b d"]:
        """Without the guidance of a distilled model where it is not `guided`."""
        t = timestep
        if self.timestep_rounding is not None:
            t = thousandfold(timestep, self.dtype, self.timestep_rounding)
        vector = self.timestep_embedder(sinusoid(t).astype(self.dtype))
        if self.guidance_embeds and guided:
            if guidance is None:
                raise ValueError("a model with guidance_embeds needs `guidance`, got None")
            # BFL and diffusers cast guidance before they multiply: 3.5 becomes 3504 in bfloat16.
            rounding = "none" if self.timestep_rounding == "none" else "bfl"
            g = thousandfold(guidance, self.dtype, rounding)
            vector = vector + self.guidance_embedder(sinusoid(g).astype(self.dtype))
        return vector + self.text_embedder(pooled_projections.astype(self.dtype))
