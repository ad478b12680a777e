"""Attention to one block of keys after the other, and what joins them.

A softmax over many keys is the average of those over blocks of them, weighted by their denominators
(Dao et al. 2022, FlashAttention; Liu et al. 2023, Ring attention). A block is attended to by the
same kernels as all keys, so that its logits are not written either.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fluxjax.config.choices import Implementation
from fluxjax.models.attention import AttentionKind, fastest, has_stand_in
from fluxjax.models.chunked_attention import chunked_gradients, chunked_with_logsum
from fluxjax.models.products import own_precision

# The logarithm of nothing; finite, so that its difference to itself is a number.
_NOTHING = float(jnp.finfo(jnp.float32).min) / 2

# Logits that plain matmuls hold at a time, of all pictures and heads: 64 MB.
_LOGITS = 2**24


class Attended(NamedTuple):
    """Queries with the keys that they have seen: the output, in float32 while there are more to
    come, and the logarithm of its softmax's denominator."""

    out: Float[Array, "b l heads k"]
    logsum: Float[Array, "b heads l"]

    def joined(self, other: Attended) -> Attended:
        """With the keys of `other` too."""
        logsum = jnp.logaddexp(self.logsum, other.logsum)

        def share(one: Attended) -> Array:
            weight = jnp.exp(one.logsum - logsum)
            return one.out * jnp.swapaxes(weight, 1, 2)[..., None]

        return Attended(share(self) + share(other), logsum)


def nothing_attended(q: Float[Array, "b l heads k"]) -> Attended:
    """Of no keys: zeros, whose weight is none when blocks are joined."""
    b, length, heads, _ = q.shape
    return Attended(
        jnp.zeros(q.shape, jnp.float32), jnp.full((b, heads, length), _NOTHING, jnp.float32)
    )


def attend_block(
    q: Float[Array, "b l heads k"],
    k: Float[Array, "b m heads k"],
    v: Float[Array, "b m heads k"],
    key_lengths: Int[Array, " b"] | None = None,
    implementation: AttentionKind = "auto",
) -> Attended:
    """Of the first `key_lengths[b]` keys of row b, which may be none. Has no derivative: see
    `block_gradients`.

    `implementation` as in `dot_product_attention`, but that `xla` holds few logits at a time, and
    that no function will do: it raises ValueError.
    """
    if callable(implementation):
        raise ValueError("attention by a function does not tell how much its keys weigh")
    if implementation == "auto":
        implementation = "xla" if has_stand_in() else fastest(q, k)
    lengths = None if key_lengths is None else jnp.clip(key_lengths, 1, k.shape[1])
    out, logsum = _kernel(implementation)(q, k, v, lengths, q.shape[-1] ** -0.5)
    found = Attended(out.astype(jnp.float32), logsum.astype(jnp.float32))
    if key_lengths is None:
        return found
    some = (key_lengths > 0)[:, None, None]
    return Attended(
        jnp.where(some[..., None], found.out, 0.0), jnp.where(some, found.logsum, _NOTHING)
    )


def block_gradients(
    q: Float[Array, "b l heads k"],
    k: Float[Array, "b m heads k"],
    v: Float[Array, "b m heads k"],
    key_lengths: Int[Array, " b"] | None,
    attended: Attended,
    grad: Float[Array, "b l heads k"],
) -> tuple[Array, Array, Array]:
    """Of q, k and v by one block of keys; `attended` has seen all blocks, `grad` is that of its
    output. Logits are computed again, a chunk at a time."""
    saved = (q, k, v, key_lengths, *attended)
    return chunked_gradients(saved, grad, q.shape[-1] ** -0.5)


def _kernel(implementation: Implementation) -> Any:
    """`kernel(q, k, v, key_lengths, scale)` -> output and logsum."""
    if implementation == "splash":
        from fluxjax.models.splash_attention import splash_with_logsum

        return splash_with_logsum
    return {"cudnn": _cudnn, "chunked": chunked_with_logsum, "xla": _in_chunks}[implementation]


def _cudnn(q: Array, k: Array, v: Array, key_lengths: Array | None, scale: float) -> Any:
    # jax.nn's function rounds the logsum to 16 bits, which is too few to weigh a block by.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    b, length = q.shape[:2]
    lengths: dict[str, Any] = {}
    if key_lengths is not None:
        lengths = {
            "q_seqlen": jnp.full(b, length, jnp.int32),
            "kv_seqlen": key_lengths.astype(jnp.int32),
            "mask_type": MaskType.PADDING,
        }
    return dot_product_attention(q, k, v, scale=scale, return_residual=True, **lengths)


def _in_chunks(q: Array, k: Array, v: Array, key_lengths: Array | None, scale: float) -> Any:
    """Plain matmuls, for some queries at a time."""
    b, length, heads, width = q.shape
    number = -(-length * b * heads * k.shape[1] // _LOGITS)
    size = -(-length // number)
    real = None
    if key_lengths is not None:
        real = (jnp.arange(k.shape[1])[None] < key_lengths[:, None])[:, None, None]
    einsum = partial(jnp.einsum, precision=own_precision(q.dtype))

    def one(queries: Array) -> tuple[Array, Array]:
        logits = einsum("blhk,bmhk->bhlm", queries, k, preferred_element_type=jnp.float32) * scale
        if real is not None:
            logits = jnp.where(real, logits, -jnp.inf)
        logsum = jax.nn.logsumexp(logits, axis=-1)
        weights = jnp.exp(logits - logsum[..., None]).astype(v.dtype)
        return einsum("bhlm,bmhk->blhk", weights, v), logsum

    if number == 1:
        return one(q)
    q = jnp.pad(q, ((0, 0), (0, number * size - length), (0, 0), (0, 0)))
    parts = jnp.moveaxis(q.reshape(b, number, size, heads, width), 1, 0)
    out, logsum = jax.lax.map(one, parts)
    out = jnp.moveaxis(out, 0, 1).reshape(b, -1, heads, width)
    return out[:, :length], jnp.moveaxis(logsum, 0, 2).reshape(b, heads, -1)[:, :, :length]
