"""Full attention through JAX's Pallas splash kernel for TPUs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    FullMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)
from jaxtyping import Array, Float, Int

from fluxjax.models.products import own_precision

LANES = 128


def splash_attention(
    q: Float[Array, "b l heads k"],
    k: Float[Array, "b m heads k"],
    v: Float[Array, "b m heads k"],
    key_lengths: Int[Array, " b"] | None,
    scale: float,
    *,
    interpret: bool = False,
) -> Float[Array, "b l heads k"]:
    """Sequences are padded to multiples of 128, and segment ids keep padding out of the softmax.

    Row b attends to its first `key_lengths[b]` keys, at least one. `interpret` runs the
    kernel's Python on any device, slowly.
    """
    return _run(q, k, v, key_lengths, scale, interpret, logsum=False)


def splash_with_logsum(
    q: Float[Array, "b l heads k"],
    k: Float[Array, "b m heads k"],
    v: Float[Array, "b m heads k"],
    key_lengths: Int[Array, " b"] | None,
    scale: float,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "b l heads k"], Float[Array, "b heads l"]]:
    """The same, and per query the logarithm of its softmax's denominator. Has no derivative."""
    out, (logsum,) = _run(q, k, v, key_lengths, scale, interpret, logsum=True)
    return out, logsum[:, :, : q.shape[1]]


def _run(
    q: Array,
    k: Array,
    v: Array,
    key_lengths: Array | None,
    scale: float,
    interpret: bool,
    logsum: bool,
) -> Any:
    length, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    padded, padded_keys = _ceil(length), _ceil(keys)
    # 4608 = 3 x 1536: FLUX at 1024 x 1024 divides well.
    block_q, block_kv = _divisor(padded, 1024), _divisor(padded_keys, 1536)
    compute = _divisor(block_kv, 512)
    kernel = make_splash_mha_single_device(
        mask=MultiHeadMask([FullMask((padded, padded_keys))] * heads),
        block_sizes=BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=compute,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_kv_dkv_compute=compute,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        interpret=interpret,
        save_residuals=logsum,
    )
    segments, over = _segments(q, k, key_lengths)
    # The kernel does not scale.
    heads_first = (_heads_first(q * scale, padded), _heads_first(k, padded_keys))
    # The kernel has no argument for it; its derivative has JAX's default.
    with jax.default_matmul_precision(own_precision(q.dtype).name.lower()):
        out: Any = jax.vmap(kernel, in_axes=(0, 0, 0, over))(
            *heads_first, _heads_first(v, padded_keys), segments
        )
    out, *rest = out if logsum else (out,)
    out = jnp.swapaxes(out, 1, 2)[:, :length]
    return (out, *rest) if logsum else out


def _segments(q: Array, k: Array, key_lengths: Array | None) -> tuple[SegmentIds, int | None]:
    """Which queries see which keys, those of the same segment, and the axis of samples if any."""
    (batch, length), keys = q.shape[:2], k.shape[1]
    padded, padded_keys = _ceil(length), _ceil(keys)
    if key_lengths is not None:
        beyond = jnp.arange(padded_keys)[None] >= jnp.minimum(key_lengths, keys)[:, None]
        return SegmentIds(jnp.zeros((batch, padded), jnp.int32), beyond.astype(jnp.int32)), 0
    segments = SegmentIds(
        q=(jnp.arange(padded) >= length).astype(jnp.int32),
        kv=(jnp.arange(padded_keys) >= keys).astype(jnp.int32),
    )
    # Padded queries must see some key, or their softmax divides zero by zero.
    if padded != length and padded_keys == keys:
        segments = segments._replace(q=jnp.zeros(padded, jnp.int32))
    return segments, None


def _heads_first(x: Array, length: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)


def _ceil(length: int) -> int:
    return -(-length // LANES) * LANES


def _divisor(length: int, most: int) -> int:
    """The largest multiple of 128, at most `most`, that divides `length`."""
    return max(d for d in range(LANES, most + 1, LANES) if length % d == 0)
