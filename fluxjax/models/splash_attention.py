"""Full attention through JAX's Pallas splash kernel for TPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    FullMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)
from jaxtyping import Array, Float

LANES = 128


def splash_attention(
    q: Float[Array, "b l heads k"],
    k: Float[Array, "b m heads k"],
    v: Float[Array, "b m heads k"],
    scale: float,
    *,
    interpret: bool = False,
) -> Float[Array, "b l heads k"]:
    """Sequences are padded to multiples of 128, and segment ids keep padding out of the softmax.

    `interpret` runs the kernel's Python on any device, slowly.
    """
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
    )
    segments = SegmentIds(
        q=(jnp.arange(padded) >= length).astype(jnp.int32),
        kv=(jnp.arange(padded_keys) >= keys).astype(jnp.int32),
    )
    # Padded queries must see some key, or their softmax divides zero by zero.
    if padded != length and padded_keys == keys:
        segments = segments._replace(q=jnp.zeros(padded, jnp.int32))
    # The kernel does not scale.
    heads_first = (_heads_first(q * scale, padded), _heads_first(k, padded_keys))
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(
        *heads_first, _heads_first(v, padded_keys), segments
    )
    return jnp.swapaxes(out, 1, 2)[:, :length]  # pyright: ignore[reportArgumentType]


def _heads_first(x: Array, length: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)


def _ceil(length: int) -> int:
    return -(-length // LANES) * LANES


def _divisor(length: int, most: int) -> int:
    """The largest multiple of 128, at most `most`, that divides `length`."""
    return max(d for d in range(LANES, most + 1, LANES) if length % d == 0)
