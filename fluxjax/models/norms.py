"""Norms over the last axis, statistics in float32."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fluxjax.models.products import Precision, multiply_scale


class RMSNorm(nn.Module):
    """Without mean or bias; cast before the scale multiplies (BFL `RMSNorm`, `T5LayerNorm`)."""

    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    precision: Precision = None

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * (1.0 / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon))
        return multiply_scale(x.astype(self.dtype), jnp.asarray(scale, self.dtype), self.precision)


class LayerNorm(nn.Module):
    """Without parameters."""

    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return (x * (1.0 / jnp.sqrt(variance + self.epsilon))).astype(self.dtype)
