"""What an adapter makes of each parameter of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Read = Callable[[str], np.ndarray]
"""Published name -> the parameter before any adapter, float32, its inputs widened with zeros."""


class Adapter(NamedTuple):
    """What one module of a model gets: x (a b) scale, in the file's layout. Of a convolution both
    are convolutions, `a` with its kernel and `b` of 1 x 1."""

    a: np.ndarray  # (rank, in), or (rank, in, [frames,] height, width)
    b: np.ndarray  # (out, rank), or (out, rank, [1,] 1, 1)
    scale: float

    def kernels(self) -> tuple[np.ndarray, np.ndarray]:
        """`a` and `b` as trees of adapters have them: ([[frames,] height, width,] in, rank), (rank,
        out)."""
        return np.moveaxis(self.a, (0, 1), (-1, -2)), self.b.reshape(self.b.shape[:2]).T


@dataclass(frozen=True)
class Change:
    """Of one parameter W: W + t delta(W) at strength t, or `value` in its place at any strength.

    `low_rank`: the same as delta where it is a product. `inputs`: of W, where they become more.
    """

    delta: Callable[[Read], np.ndarray] | None = None
    value: np.ndarray | None = None
    low_rank: Adapter | None = None
    inputs: int | None = None


def low_rank(adapter: Adapter, inputs: int | None = None) -> Change:
    """scale x b a; `inputs`: how many the changed weight has, where it has more than before."""

    def delta(read: Read) -> np.ndarray:
        return (adapter.b @ adapter.a) * np.float32(adapter.scale)

    return Change(delta, low_rank=None if inputs else adapter, inputs=inputs)


def constant(delta: np.ndarray) -> Change:
    """A change that is the same for every weight."""
    return Change(lambda read: delta)


Form = Callable[[np.ndarray], np.ndarray]


class Formed:
    """The change of one module of a file, formed for all the modules of ours that it holds.

    `shapes`: theirs. `form`: W of all of them, one under the other, as a matrix -> what is added,
    one too; W is empty where it is not used. A Kronecker block need not end where a module ends, so
    rows are split only afterwards.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        form: Form,
        *,
        uses_weight: bool,
        swap_halves: bool,
    ):
        self._shapes, self._form = shapes, form
        self._uses_weight, self._swap_halves = uses_weight, swap_halves
        self._left: dict[str, np.ndarray] = {}

    def change(self, name: str, inputs: int | None = None) -> Change:
        """Of the parameter `name`."""
        return Change(lambda read: self._rows(name, read), inputs=inputs)

    def _rows(self, name: str, read: Read) -> np.ndarray:
        rows = self._left.pop(name, None)
        if rows is not None:
            return rows
        weight = np.empty((0, 0), np.float32)
        if self._uses_weight:
            weights = map(read, self._shapes)
            weight = np.concatenate([part.reshape(len(part), -1) for part in weights])
        whole = self._swapped(self._form(self._swapped(weight)))
        ends = np.cumsum([shape[0] for shape in self._shapes.values()])[:-1]
        parts = {
            part: rows if len(shape) == 2 else rows.reshape(shape)
            for (part, shape), rows in zip(self._shapes.items(), np.split(whole, ends), strict=True)
        }
        rows = parts.pop(name)
        self._left = parts  # each is asked for once; then nothing is kept
        return rows

    def _swapped(self, rows: np.ndarray) -> np.ndarray:
        return np.roll(rows, len(rows) // 2, axis=0) if self._swap_halves else rows
