"""A product with a kernel that must be converted first, a tile of the kernel at a time.

CPUs multiply in float32: XLA converts a kernel of 16 bits, or of codes, as a whole before its
product, so that the largest matrix of a network lies there once more in float32. A tile of it stays
in the cache while it is multiplied: 2 + 4 blocks of width 3072 in int8 take 5.4 instead of 7.8
seconds of two cores for 320 tokens.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fluxjax.models.quantised import Quantised, decode

TILE = 2**21  # elements that are converted at once: 8 MB in float32


def is_large(kernel: Any) -> bool:
    """Whether it is converted for a product, and larger than one tile."""
    size = kernel.shape[0] * kernel.shape[1]
    return (isinstance(kernel, Quantised) or kernel.dtype != jnp.float32) and size > TILE


def tiled_product(
    x: Float[Array, "*rows k"], kernel: Float[Array, "k n"] | Quantised
) -> Float[Array, "*rows n"]:
    """`x kernel` in the type of `x`, its sums in float32; codes are decoded to float32."""
    columns = kernel.shape[0 if isinstance(kernel, Quantised) else 1]
    size = _tile(x.shape[-1], columns)
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)

    def tile(i: Any, y: Float[Array, "r n"]) -> Float[Array, "r n"]:
        part = _product(rows, kernel, i * size, size).astype(y.dtype)
        return lax.dynamic_update_slice_in_dim(y, part, i * size, 1)

    y = lax.fori_loop(0, columns // size, tile, jnp.zeros((rows.shape[0], columns), x.dtype))
    return y.reshape(*x.shape[:-1], columns)


def _tile(inputs: int, columns: int) -> int:
    """Columns of a tile, of which `columns` is a multiple; all where no number of them will do."""
    fewest = -(-inputs * columns // TILE)
    counts = (n for n in range(fewest, min(4 * fewest, columns) + 1) if columns % n == 0)
    return columns // next(counts, 1)


def _product(
    x: Float[Array, "r k"], kernel: Float[Array, "k n"] | Quantised, start: Any, size: int
) -> Float[Array, "r size"]:
    """With columns of the kernel from `start` on."""
    if isinstance(kernel, Quantised):
        few = kernel.map(lambda part: lax.dynamic_slice_in_dim(part, start, size, 0))
        values, axis = decode(few), 1
    else:
        values, axis = lax.dynamic_slice_in_dim(kernel, start, size, 1).astype(jnp.float32), 0
    contracting = (((1,), (axis,)), ((), ()))
    return lax.dot_general(x, values, contracting, precision=lax.Precision.HIGHEST)
