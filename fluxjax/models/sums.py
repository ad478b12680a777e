"""Norms, biases and scales whose sums over rows or columns are products with ones on CPUs.

XLA's own reductions go through windows of 32 there: the derivative of a bias of (1088, 768), a sum
over its rows, takes 0.9 ms on two cores, as a product less than 0.1 ms.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fluxjax.models.bfloat16_products import bfloat16_products

_ONES = 8  # rows or columns of them: for one alone XLA would not call its matrix product


def normalize(
    x: Float[Array, "*rows d"], eps: float, *, centred: bool = False
) -> Float[Array, "*rows d"]:
    """RMS norm of each row, or with `centred` its layer norm; float32, without parameters."""
    return _normalize(x.astype(jnp.float32), eps, centred)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _normalize(x: Array, eps: float, centred: bool) -> Array:
    return _normalize_forward(x, eps, centred)[0]


def _normalize_forward(x, eps, centred):
    if centred:
        x = x - _mean(x)
    inverse = 1.0 / jnp.sqrt(_mean(jnp.square(x)) + eps)
    y = x * inverse
    return y, (y, inverse)


def _normalize_backward(_, centred, saved, gradient):
    y, inverse = saved
    if centred:
        gradient = gradient - _mean(gradient)
    return (inverse * (gradient - y * _mean(gradient * y)),)


_normalize.defvjp(_normalize_forward, _normalize_backward)


@jax.custom_vjp
def add_bias(x: Float[Array, "*rows d"], bias: Float[Array, " d"]) -> Float[Array, "*rows d"]:
    """`x + bias`, with a quick derivative of the bias."""
    return x + _row(bias, x)


add_bias.defvjp(
    lambda x, bias: (add_bias(x, bias), None),
    lambda _, gradient: (gradient, _column_sums(gradient)),
)


@jax.custom_vjp
def multiply_scale(
    x: Float[Array, "*rows d"], scale: Float[Array, " d"]
) -> Float[Array, "*rows d"]:
    """`x * scale`, with a quick derivative of the scale."""
    return x * _row(scale, x)


multiply_scale.defvjp(
    lambda x, scale: (multiply_scale(x, scale), (x, scale)),
    lambda saved, gradient: (multiply_scale(gradient, saved[1]), _column_sums(gradient * saved[0])),
)


def _slow_sums() -> bool:
    """On CPUs, except where YNNPACK computes: it sums as quickly as it multiplies."""
    return jax.default_backend() == "cpu" and not bfloat16_products()


def _row(vector: Array, x: Array) -> Array:
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def _mean(x: Array) -> Array:
    """Of each row, as a column."""
    if not _slow_sums():
        return jnp.mean(x, axis=-1, keepdims=True)
    ones = jnp.ones((x.shape[-1], _ONES), x.dtype)
    return _product(x, ones)[..., :1] / x.shape[-1]


def _column_sums(x: Array) -> Array:
    if not _slow_sums():
        return jnp.sum(x, axis=range(x.ndim - 1))
    x = x.reshape(-1, x.shape[-1])
    return _product(jnp.ones((_ONES, x.shape[0]), x.dtype), x)[0]


def _product(a: Array, b: Array) -> Array:
    dimensions = ((a.ndim - 1,), (0,)), ((), ())
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32).astype(a.dtype)
