"""Attention as flash kernels do it, for counting: no memory for the logits, whatever the device.

A plan is compiled for simulated CPUs, where `auto` would take a loop over pictures and heads that
cannot be split over devices. This one is cut into chunks of queries only, and so is split as the
kernels on accelerators are. Wide heads (the autoencoder's) have no such kernels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fluxjax.models.attention import plain_attention

_CHUNK = 128
_WIDEST = 256


def flash_like(
    q: Float[Array, "b l heads k"],
    k: Float[Array, "b m heads k"],
    v: Float[Array, "b m heads k"],
    key_lengths: Int[Array, " b"] | None = None,
) -> Float[Array, "b l heads k"]:
    """softmax(q k^T / sqrt(k)) v; logits of one chunk at a time, computed again going backwards."""
    b, length, heads, width = q.shape
    scale = width**-0.5
    if width > _WIDEST or length <= _CHUNK:
        return plain_attention(q, k, v, key_lengths, scale=scale)
    chunks = -(-length // _CHUNK)
    q = jnp.pad(q, ((0, 0), (0, chunks * _CHUNK - length), (0, 0), (0, 0)))
    q = jnp.moveaxis(q.reshape(b, chunks, _CHUNK, heads, width), 1, 0)

    @jax.checkpoint
    def one(part: Array) -> Array:
        return plain_attention(part, k, v, key_lengths, scale=scale)

    out = jnp.moveaxis(jax.lax.map(one, q), 0, 1)
    return out.reshape(b, -1, heads, width)[:, :length]
