"""Full attention on CPUs: a loop over heads and chunks of queries that stays in the cache.

XLA's own path writes all logits of all heads to memory and is 2 to 5 times slower than PyTorch's
kernel there. Here one chunk's logits exist at a time, forward and backward.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Logits of one chunk: 9 MB. Smaller ones stay nearer to the processor, but XLA's matrix products
# are faster the larger they are, and two threads share out each of them.
_CHUNK_LOGITS = 1536 * 1536
_LEAST_CHUNK = 64
_ONES = 8  # columns of ones beside the values: their product with the weights is the row sum
_LOG2_E = 1.4426950408889634
_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_attention(
    q: Float[Array, "b l heads k"],
    k: Float[Array, "b m heads k"],
    v: Float[Array, "b m heads k"],
    key_lengths: Int[Array, " b"] | None,
    scale: float,
) -> Float[Array, "b l heads k"]:
    """softmax(q k^T scale) v in float32; the result has the dtype of `q`.

    Row b attends to its first `key_lengths[b]` keys, at least one.
    """
    return _forward(q, k, v, key_lengths, scale)[0]


def _forward(q, k, v, key_lengths, scale):
    """The output, and per query the log2 of its softmax's denominator (b, heads, l padded)."""
    # Bounds every |logit| (Cauchy-Schwarz), in powers of two. Normalised heads stay far below 64,
    # where exp2 neither overflows nor underflows: the pass that finds the maximum falls away.
    # Chosen here and not in the loop, where a branch would copy the logits.
    bound = scale * _LOG2_E * _largest_norm(q) * _largest_norm(k)
    fast, safe = (partial(_loop, exponentiate, scale) for exponentiate in (_exp2, _shifted))
    return lax.cond(bound < 64.0, fast, safe, q, k, v, key_lengths)


def _largest_norm(x: Float[Array, "b l heads k"]) -> Float[Array, ""]:
    batch, length, heads, width = x.shape

    def one_head(index, largest):  # all at once, the squares alone would be as large as x
        rows = _head(x, index // heads, index % heads, 0, length)
        # A product with ones: XLA adds along the last axis one number at a time on CPUs.
        squares = _matmul(jnp.square(rows), jnp.ones(width, jnp.float32))
        return jnp.maximum(largest, jnp.max(squares))

    return jnp.sqrt(lax.fori_loop(0, batch * heads, one_head, jnp.float32(0.0)))


def _loop(exponentiate, scale, q, k, v, key_lengths):
    batch, length, heads, _ = q.shape
    chunk, chunks = _chunking(length, k.shape[1])
    padded = _pad_length(q, chunk * chunks)
    out = jnp.zeros(padded.shape, q.dtype)
    logsum = jnp.zeros((batch, heads, chunk * chunks), jnp.float32)

    def one_head(index, carry):
        b, h = index // heads, index % heads
        keys, values = (_head(x, b, h, 0, x.shape[1]) for x in (k, v))
        values = jnp.pad(values, ((0, 0), (0, _ONES)), constant_values=1.0)
        padding = _padding(key_lengths, b, k.shape[1])

        def one_chunk(i, carry):
            out, logsum = carry
            queries = _head(padded, b, h, i * chunk, chunk) * (scale * _LOG2_E)
            weights, shift = exponentiate(_logits(queries, keys, padding))
            # A column of the product and not a sum: XLA adds along rows more slowly.
            sums = _matmul(weights, values)
            total = sums[:, -1:]
            rows = sums[:, :-_ONES] / total
            out = lax.dynamic_update_slice(
                out, rows.astype(out.dtype)[None, :, None, :], (b, i * chunk, h, 0)
            )
            row_logsum = (shift + jnp.log2(total)).reshape(1, 1, chunk)
            return out, lax.dynamic_update_slice(logsum, row_logsum, (b, h, i * chunk))

        return lax.fori_loop(0, chunks, one_chunk, carry)

    out, logsum = lax.fori_loop(0, batch * heads, one_head, (out, logsum))
    return out[:, :length], logsum


def _forward_rule(q, k, v, key_lengths, scale):
    out, logsum = _forward(q, k, v, key_lengths, scale)
    return out, (q, k, v, key_lengths, out, logsum)


def _backward_rule(scale, saved, grad):
    q, k, v, key_lengths, out, logsum = saved
    batch, length, heads, _ = q.shape
    chunk, chunks = _chunking(length, k.shape[1])
    # d logits = p (d p - delta), delta the row sum of out * d out (Dao et al., FlashAttention).
    padded, out, grad = (_pad_length(x, chunk * chunks) for x in (q, out, grad))

    def one_head(index, carry):
        b, h = index // heads, index % heads
        keys, values = (_head(x, b, h, 0, x.shape[1]) for x in (k, v))
        padding = _padding(key_lengths, b, k.shape[1])

        def one_chunk(i, carry):
            dq, dk, dv = carry
            queries, rows, drows = (_head(x, b, h, i * chunk, chunk) for x in (padded, out, grad))
            row_logsum = lax.dynamic_slice(logsum, (b, h, i * chunk), (1, 1, chunk))
            logits = _logits(queries * (scale * _LOG2_E), keys, padding)
            weights = jnp.exp2(logits - row_logsum.reshape(chunk, 1))
            delta = jnp.sum(rows * drows, axis=-1, keepdims=True)
            dlogits = weights * (_matmul_transposed(drows, values) - delta) * scale
            dq = lax.dynamic_update_slice(
                dq, _matmul(dlogits, keys).astype(dq.dtype)[None, :, None, :], (b, i * chunk, h, 0)
            )
            return dq, dk + _matmul(dlogits.T, queries), dv + _matmul(weights.T, drows)

        dq, dk, dv = carry
        zero = jnp.zeros(keys.shape, jnp.float32)
        dq, dk_head, dv_head = lax.fori_loop(0, chunks, one_chunk, (dq, zero, zero))
        dk, dv = (
            lax.dynamic_update_slice(x, one.astype(x.dtype)[None, :, None, :], (b, 0, h, 0))
            for x, one in ((dk, dk_head), (dv, dv_head))
        )
        return dq, dk, dv

    zeros = (jnp.zeros_like(padded), jnp.zeros_like(k), jnp.zeros_like(v))
    dq, dk, dv = lax.fori_loop(0, batch * heads, one_head, zeros)
    return dq[:, :length], dk, dv, None


chunked_attention.defvjp(_forward_rule, _backward_rule)


def _chunking(length: int, keys: int) -> tuple[int, int]:
    """Equal chunks of queries: (size, number)."""
    chunks = -(-length // max(_LEAST_CHUNK, _CHUNK_LOGITS // keys))
    return -(-length // chunks), chunks


def _pad_length(x: Array, length: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


def _head(x: Array, b: Array, h: Array, start: Array | int, size: int) -> Float[Array, "l k"]:
    """Rows `start` to `start + size` of one head of one sample, contiguous and in float32."""
    part = lax.dynamic_slice(x, (b, start, h, 0), (1, size, 1, x.shape[-1]))
    return part.reshape(size, x.shape[-1]).astype(jnp.float32)


def _padding(key_lengths: Array | None, b: Array, keys: int) -> Float[Array, "1 m"] | None:
    """What is added to the logits of sample `b`: -inf at its padded keys."""
    if key_lengths is None:
        return None
    return jnp.where(jnp.arange(keys) < key_lengths[b], 0.0, -jnp.inf)[None]


def _logits(
    queries: Float[Array, "l k"], keys: Float[Array, "m k"], padding: Float[Array, "1 m"] | None
) -> Float[Array, "l m"]:
    logits = _matmul_transposed(queries, keys)
    return logits if padding is None else logits + padding


def _matmul_transposed(a: Float[Array, "l k"], b: Float[Array, "m k"]) -> Float[Array, "l m"]:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)


def _exp2(x: Float[Array, "l m"]) -> tuple[Float[Array, "l m"], Float[Array, "l 1"]]:
    return jnp.exp2(x), jnp.zeros((x.shape[0], 1), x.dtype)


def _shifted(x: Float[Array, "l m"]) -> tuple[Float[Array, "l m"], Float[Array, "l 1"]]:
    shift = jnp.max(x, axis=-1, keepdims=True)
    return jnp.exp2(x - shift), shift
