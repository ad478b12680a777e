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
    kernel: Float[Array, "k n"] | Quantised, *parts: Float[Array, "*rows _"]
) -> Float[Array, "*rows n"]:
    """`x kernel`, of an x that is given in parts of its k: joined they would lie there once more in
    float32. In their type, sums in float32; codes are decoded to float32."""
    columns = kernel.shape[0 if isinstance(kernel, Quantised) else 1]
    size = _tile(sum(part.shape[-1] for part in parts), columns)
    first, *_ = parts
    rows = [part.reshape(-1, part.shape[-1]).astype(jnp.float32) for part in parts]

    def tile(i: Any, y: Float[Array, "r n"]) -> Float[Array, "r n"]:
        part = _product(rows, kernel, i * size, size).astype(y.dtype)
        return lax.dynamic_update_slice_in_dim(y, part, i * size, 1)

    y = jnp.zeros((rows[0].shape[0], columns), first.dtype)
    y = lax.fori_loop(0, columns // size, tile, y)
    return y.reshape(*first.shape[:-1], columns)


def _tile(inputs: int, columns: int) -> int:
    """Columns of a tile, of which `columns` is a multiple; all where no number of them will do."""
    fewest = -(-inputs * columns // TILE)
    counts = (n for n in range(fewest, min(4 * fewest, columns) + 1) if columns % n == 0)
    return columns // next(counts, 1)


def _product(
    parts: list[Float[Array, "r _"]],
    kernel: Float[Array, "k n"] | Quantised,
    start: Any,
    size: int,
) -> Float[Array, "r size"]:
    """With columns of the kernel from `start` on."""
    if isinstance(kernel, Quantised):
        few = kernel.map(lambda part: lax.dynamic_slice_in_dim(part, start, size, 0))
        values, axis = decode(few), 1
    else:
        values, axis = lax.dynamic_slice_in_dim(kernel, start, size, 1).astype(jnp.float32), 0
    contracting = (((1,), (axis,)), ((), ()))
    y, done = None, 0
    for part in parts:
        own = lax.slice_in_dim(values, done, done + part.shape[1], axis=axis)
        product = lax.dot_general(part, own, contracting, precision=lax.Precision.HIGHEST)
        y, done = product if y is None else y + product, done + part.shape[1]
    assert y is not None
    return y
