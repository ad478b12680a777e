"""A tensor that is known by shape and dtype and read only when asked, rows at a time.

Every conversion is a view of such tensors (rows of, concatenation of, transpose of), so that a
checkpoint of any size is converted with one tensor in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from fluxjax.models.quantised import Quantised, decode

AT_ONCE = 2**22  # elements that are decoded or quantised at once


@dataclass(frozen=True)
class Tensor:
    """`rows(start, stop)` reads that range of the first axis; a scalar is read as (0, 0).

    `by_rows`: reading a range costs no more than its share, so a large tensor may be read in parts.
    `packed`: the codes of a file that these values are decoded from, as lazy tensors of its rows.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[int, int], np.ndarray]
    by_rows: bool = False
    packed: Quantised | None = None

    def read(self) -> np.ndarray:
        return self.rows(0, self.shape[0] if self.shape else 0)

    def blocks(self, max_bytes: int = 2**26) -> Iterator[np.ndarray]:
        """The rows in order, in contiguous blocks of about `max_bytes` where they can be had."""
        if not self.shape or not self.by_rows or self.nbytes <= max_bytes:
            yield np.ascontiguousarray(self.read())
            return
        step = max(1, max_bytes * self.shape[0] // self.nbytes)
        for start in range(0, self.shape[0], step):
            yield np.ascontiguousarray(self.rows(start, min(start + step, self.shape[0])))

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def of_array(array: Any) -> Tensor:
    """View of a numpy or JAX array; a JAX array is copied to the host one range at a time."""
    rows = partial(_rows_of_array, array)
    return Tensor(tuple(array.shape), np.dtype(array.dtype), rows, by_rows=True)


def _rows_of_array(array: Any, start: int, stop: int) -> np.ndarray:
    if not array.ndim or (start, stop) == (0, array.shape[0]):
        return np.asarray(array)
    if isinstance(array, jax.Array) and stop == start + 1:
        return np.asarray(array[start])[None]
    return np.asarray(array[start:stop])


def as_tensor(value: Any) -> Tensor:
    """An array, or what is lazy already, as a lazy tensor."""
    return value if isinstance(value, Tensor) else of_array(value)


def slice_rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of the first axis."""
    if (start, stop) == (0, tensor.shape[0]):
        return tensor
    shape = (stop - start, *tensor.shape[1:])
    packed = tensor.packed and tensor.packed.map(lambda part: slice_rows(part, start, stop))
    rows = lambda a, b: tensor.rows(start + a, start + b)  # noqa: E731
    return Tensor(shape, tensor.dtype, rows, tensor.by_rows, packed)


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

    shape = (int(starts[-1]), *tensors[0].shape[1:])
    by_rows = all(part.by_rows for part in tensors)
    return Tensor(shape, tensors[0].dtype, rows, by_rows, _joined([t.packed for t in tensors]))


def _joined(packed: Sequence[Quantised | None]) -> Quantised | None:
    """Of parts that are all quantised in one way, with the same number of columns."""
    first = packed[0]
    if first is None:
        return None
    forms = {
        p and (p.kind, *((k, t.shape[1:], t.dtype) for k, t in sorted(p.parts.items())))
        for p in packed
    }
    if len(forms) > 1:
        return None
    return Quantised(
        first.kind,
        {name: concatenate([p.parts[name] for p in packed if p]) for name in first.parts},
    )


def unpacked(packed: Quantised, dtype: Any = np.float32) -> Tensor:
    """The values of lazy codes, a few rows decoded at a time."""
    dtype = np.dtype(dtype)
    shape = (packed.shape[0], packed.columns)
    step = max(1, AT_ONCE // shape[1])

    def rows(start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, shape[1]), dtype)
        for a in range(start, stop, step):
            b = min(a + step, stop)
            with np.errstate(over="ignore", invalid="ignore"):  # who uses values, checks them
                values = decode(packed.map(lambda part, a=a, b=b: part.rows(a, b)))
                out[a - start : b - start] = values
        return out

    return Tensor(shape, dtype, rows, by_rows=True, packed=packed)


def swap_halves(tensor: Tensor) -> Tensor:
    """The second half of the rows before the first."""
    half = tensor.shape[0] // 2
    return concatenate([slice_rows(tensor, half, 2 * half), slice_rows(tensor, 0, half)])


def interleave(tensor: Tensor, size: int) -> Tensor:
    """In every `size` rows those of the first half at even places, of the second at odd ones."""
    return _permuted(tensor, np.arange(size).reshape(2, -1).T.ravel())


def deinterleave(tensor: Tensor, size: int) -> Tensor:
    """The inverse of `interleave`."""
    return _permuted(tensor, np.arange(size).reshape(-1, 2).T.ravel())


def _permuted(tensor: Tensor, order: np.ndarray) -> Tensor:
    """Every len(order) rows in this order, which must divide the rows."""
    size = len(order)

    def rows(start: int, stop: int) -> np.ndarray:
        first, last = start // size * size, -(-stop // size) * size
        groups = tensor.rows(first, last).reshape(-1, size, *tensor.shape[1:])
        taken = groups[:, order].reshape(-1, *tensor.shape[1:])
        return taken[start - first : stop - first]

    packed = tensor.packed and tensor.packed.map(lambda part: _permuted(part, order))
    return Tensor(tensor.shape, tensor.dtype, rows, tensor.by_rows, packed)


def index(tensor: Tensor, i: int) -> Tensor:
    """The i-th element of the first axis, as of a stacked leaf."""
    return of_whole(tensor.shape[1:], tensor.dtype, lambda: tensor.rows(i, i + 1)[0])


def transpose(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A view; the caller makes it contiguous where that matters."""
    shape = tuple(tensor.shape[axis] for axis in axes)
    return of_whole(shape, tensor.dtype, lambda: tensor.read().transpose(axes))


def reshape(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """To a shape with the same first axis."""
    return Tensor(
        shape,
        tensor.dtype,
        lambda a, b: tensor.rows(a, b).reshape(b - a, *shape[1:]),
        tensor.by_rows,
    )


def astype(tensor: Tensor, dtype: np.dtype) -> Tensor:
    """The same values in another dtype."""
    if tensor.dtype == dtype:
        return tensor
    return Tensor(tensor.shape, dtype, lambda a, b: tensor.rows(a, b).astype(dtype), tensor.by_rows)


def of_whole(shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]) -> Tensor:
    """What `read` gives, which is read whole for any of its rows."""
    return Tensor(tuple(shape), np.dtype(dtype), partial(_rows_of_whole, read))


def _rows_of_whole(read: Callable[[], np.ndarray], start: int, stop: int) -> np.ndarray:
    whole = read()
    return whole[start:stop] if whole.ndim else whole
