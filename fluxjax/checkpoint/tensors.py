"""A tensor that is known by shape and dtype and read only when asked, rows at a time.

Every conversion is a view of such tensors (rows of, concatenation of, transpose of), so that a
checkpoint of any size is converted with one tensor in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class Tensor:
    """`rows(start, stop)` reads that range of the first axis; a scalar is read as (0, 0)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[int, int], np.ndarray]

    def read(self) -> np.ndarray:
        return self.rows(0, self.shape[0] if self.shape else 0)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def of_array(array: Any) -> Tensor:
    """View of a numpy or JAX array; a JAX array is copied to the host one range at a time."""

    def rows(start: int, stop: int) -> np.ndarray:
        if not array.ndim or (start, stop) == (0, array.shape[0]):
            return np.asarray(array)
        if isinstance(array, jax.Array) and stop == start + 1:
            return np.asarray(array[start])[None]
        return np.asarray(array[start:stop])

    return Tensor(tuple(array.shape), np.dtype(array.dtype), rows)


def slice_rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    if (start, stop) == (0, tensor.shape[0]):
        return tensor
    shape = (stop - start, *tensor.shape[1:])
    return Tensor(shape, tensor.dtype, lambda a, b: tensor.rows(start + a, start + b))


def concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Along the first axis; all parts must have one dtype (values are never changed)."""
    if len(tensors) == 1:
        return tensors[0]
    dtypes = {part.dtype for part in tensors}
    if len(dtypes) > 1:
        raise ValueError(f"cannot join tensors of dtypes {sorted(map(str, dtypes))} into one")
    starts = np.cumsum([0, *(part.shape[0] for part in tensors)])

    def rows(start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, *tensors[0].shape[1:]), tensors[0].dtype)
        for part, first in zip(tensors, starts[:-1], strict=True):
            a, b = max(start, first), min(stop, first + part.shape[0])
            if a < b:
                out[a - start : b - start] = part.rows(int(a - first), int(b - first))
        return out

    return Tensor((int(starts[-1]), *tensors[0].shape[1:]), tensors[0].dtype, rows)


def swap_halves(tensor: Tensor) -> Tensor:
    half = tensor.shape[0] // 2
    return concatenate([slice_rows(tensor, half, 2 * half), slice_rows(tensor, 0, half)])


def index(tensor: Tensor, i: int) -> Tensor:
    """The i-th element of the first axis, as of a stacked leaf."""
    return of_whole(tensor.shape[1:], tensor.dtype, lambda: tensor.rows(i, i + 1)[0])


def transpose(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A view; the caller makes it contiguous where that matters."""
    shape = tuple(tensor.shape[axis] for axis in axes)
    return of_whole(shape, tensor.dtype, lambda: tensor.read().transpose(axes))


def reshape(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return of_whole(shape, tensor.dtype, lambda: tensor.read().reshape(shape))


def astype(tensor: Tensor, dtype: np.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    return Tensor(tensor.shape, dtype, lambda a, b: tensor.rows(a, b).astype(dtype))


def of_whole(shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]) -> Tensor:
    def rows(start: int, stop: int) -> np.ndarray:
        whole = read()
        return whole[start:stop] if shape else whole

    return Tensor(tuple(shape), np.dtype(dtype), rows)
