"""Full attention on CPUs: a loop over heads and chunks of queries that stays in the cache.

XLA's own path writes all logits of all heads to memory and is 2 to 5 times slower than PyTorch's
kernel there. Here one chunk's logits exist at a time, forward and backward.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fluxjax.models.products import own_precision

# Logits of one chunk: 9 MB. Smaller ones stay nearer to the processor, but XLA's matrix products
# are faster the larger they are, and two threads share out each of them.
_CHUNK_LOGITS = 1536 * 1536
_LEAST_CHUNK = 64
_ONES = 8  # columns of ones beside the values: their product with the weights is the row sum
_LOG2_E = 1.4426950408889634


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
    return chunked_with_logsum(q, k, v, key_lengths, scale)[0]


def chunked_with_logsum(
    q: Float[Array, "b l heads k"],
    k: Float[Array, "b m heads k"],
    v: Float[Array, "b m heads k"],
    key_lengths: Int[Array, " b"] | None,
    scale: float,
) -> tuple[Float[Array, "b l heads k"], Float[Array, "b heads l"]]:
    """The output, and per query the logarithm of its softmax's denominator."""
    # Bounds every |logit| (Cauchy-Schwarz), in powers of two. Normalised heads stay far below 64,
    # where exp2 neither overflows nor underflows: the pass that finds the maximum falls away.
    # Chosen here and not in the loop, where a branch would copy the logits.
    bound = scale * _LOG2_E * _largest_norm(q) * _largest_norm(k)
    fast, safe = (partial(_loop, exponentiate, scale) for exponentiate in (_exp2, _shifted))
    out, logsum = lax.cond(bound < 64.0, fast, safe, q, k, v, key_lengths)
    return out, logsum[:, :, : q.shape[1]] / _LOG2_E


def _largest_norm(x: Float[Array, "b l heads k"]) -> Float[Array, ""]:
    batch, length, heads, width = x.shape

    def one_head(index, largest):  # all at once, the squares alone would be as large as x
        rows = _head(x, index // heads, index % heads, 0, length)
        # A product with ones: XLA adds along the last axis one number at a time on CPUs.
        squares = _product(jnp.square(rows), jnp.ones(width, jnp.float32), x.dtype)
        return jnp.maximum(largest, jnp.max(squares))

    return jnp.sqrt(lax.fori_loop(0, batch * heads, one_head, jnp.float32(0.0)))


def _loop(exponentiate, scale, q, k, v, key_lengths):
    """The output, and log2 of the denominators, of queries that fill their chunks."""
    batch, length, heads, _ = q.shape
    chunk, chunks = _chunking(length, k.shape[1])
    product, transposed = (partial(f, dtype=q.dtype) for f in (_product, _product_transposed))
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
            weights, shift = exponentiate(transposed(queries, keys) + padding)
            # A column of the product and not a sum: XLA adds along rows more slowly.
            sums = product(weights, values)
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
    out, logsum = chunked_with_logsum(q, k, v, key_lengths, scale)
    return out, (q, k, v, key_lengths, out, logsum)


def _backward_rule(scale, saved, grad):
    return *chunked_gradients(saved, grad, scale), None


def chunked_gradients(
    saved: tuple[Any, ...], grad: Float[Array, "b l heads k"], scale: float
) -> tuple[Array, Array, Array]:
    """Of q, k and v; `saved`: (q, k, v, key_lengths, out, logsum).

    Where these keys are a part of all, `out` and `logsum` are those of all, and `key_lengths` may
    be 0.
    """
    q, k, v, key_lengths, out, logsum = saved
    batch, length, heads, _ = q.shape
    chunk, chunks = _chunking(length, k.shape[1])
    product, transposed = (partial(f, dtype=q.dtype) for f in (_product, _product_transposed))
    # d logits = p (d p - delta), delta the row sum of out * d out (Dao et al., FlashAttention).
    padded, out, grad = (_pad_length(x, chunk * chunks) for x in (q, out, grad))
    # Keys and values gather over queries as (k, l) (l, m): XLA is slower at (l, m)^T (l, k),
    # ten times for heads of 16, and also where the transposed operand is no array of its own.
    across = [jnp.transpose(x, (0, 2, 3, 1)) for x in (padded, grad)]
    logsum = jnp.pad(logsum * _LOG2_E, ((0, 0), (0, 0), (0, chunk * chunks - length)))

    def one_head(index, carry):
        b, h = index // heads, index % heads
        keys, values = (_head(x, b, h, 0, x.shape[1]) for x in (k, v))
        padding = _padding(key_lengths, b, k.shape[1])

        def one_chunk(i, carry):
            dq, dk, dv = carry
            queries, rows, drows = (_head(x, b, h, i * chunk, chunk) for x in (padded, out, grad))
            row_logsum = lax.dynamic_slice(logsum, (b, h, i * chunk), (1, 1, chunk))
            logits = transposed(queries * (scale * _LOG2_E), keys) + padding
            weights = jnp.exp2(logits - row_logsum.reshape(chunk, 1))
            delta = jnp.sum(rows * drows, axis=-1, keepdims=True)
            dlogits = weights * (transposed(drows, values) - delta) * scale
            queries, drows = (_head_across(x, b, h, i * chunk, chunk) for x in across)
            dq = lax.dynamic_update_slice(
                dq, product(dlogits, keys).astype(dq.dtype)[None, :, None, :], (b, i * chunk, h, 0)
            )
            return dq, dk + product(queries, dlogits), dv + product(drows, weights)

        dq, dk, dv = carry
        zero = jnp.zeros(keys.T.shape, jnp.float32)
        ends = lax.fori_loop(0, chunks, one_chunk, (dq, zero, zero))
        # Else XLA transposes the operands of the products instead of these.
        dq, dk_head, dv_head = lax.optimization_barrier(ends)
        dk, dv = (
            lax.dynamic_update_slice(x, one.T.astype(x.dtype)[None, :, None, :], (b, 0, h, 0))
            for x, one in ((dk, dk_head), (dv, dv_head))
        )
        return dq, dk, dv

    zeros = (jnp.zeros_like(padded), jnp.zeros_like(k), jnp.zeros_like(v))
    dq, dk, dv = lax.fori_loop(0, batch * heads, one_head, zeros)
    return dq[:, :length], dk, dv


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


def _head_across(
    x: Float[Array, "b heads k l"], b: Array, h: Array, start: Array | int, size: int
) -> Float[Array, "k size"]:
    """As `_head`, of what has its rows last."""
    part = lax.dynamic_slice(x, (b, h, 0, start), (1, 1, x.shape[2], size))
    return part.reshape(x.shape[2], size).astype(jnp.float32)


def _padding(key_lengths: Array | None, b: Array, keys: int) -> Float[Array, "1 m"] | float:
    """What is added to the logits of sample `b`: -inf at its padded keys."""
    if key_lengths is None:
        return 0.0
    return jnp.where(jnp.arange(keys) < key_lengths[b], 0.0, -jnp.inf)[None]


def _product(a: Array, b: Array, dtype: Any) -> Array:
    """In float32, of values that were `dtype`: accelerators may round them to it again."""
    return jnp.matmul(a, b, precision=own_precision(dtype))


def _product_transposed(
    a: Float[Array, "l k"], b: Float[Array, "m k"], dtype: Any
) -> Float[Array, "l m"]:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=own_precision(dtype))


def _exp2(x: Float[Array, "l m"]) -> tuple[Float[Array, "l m"], Float[Array, "l 1"]]:
    return jnp.exp2(x), jnp.zeros((x.shape[0], 1), x.dtype)


def _shifted(x: Float[Array, "l m"]) -> tuple[Float[Array, "l m"], Float[Array, "l 1"]]:
    shift = jnp.max(x, axis=-1, keepdims=True)
    return jnp.exp2(x - shift), shift
