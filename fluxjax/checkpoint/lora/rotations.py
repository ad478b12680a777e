"""Adapters that turn a weight: OFT and BOFT, as LyCORIS and kohya write them, and as PEFT does.

A skew matrix S becomes the rotation (1 + S)(1 - S)^-1 (Cayley). LyCORIS and kohya turn a layer's
outputs (rows of W, W is (out, in)), PEFT its inputs. Each function gives what is added to W.

Source: LyCORIS' `functional/{diag_oft,boft}.py`; kohya's `oft_flux.py`; PEFT's `tuners/{oft,boft}`.
Qiu et al. 2023 (OFT), Liu et al. 2023 (BOFT).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Arrays = Mapping[str, np.ndarray]


class Cayley(NamedTuple):
    """How PEFT turns: by so many terms of the Neumann series of (1 - S)^-1, where 0 inverts; and
    the largest norm of a block, divided by the root of their number, where there is one (COFT)."""

    terms: int = 0
    largest: float | None = None


def outputs_turned(t: Arrays, constraint: float, weight: np.ndarray) -> np.ndarray:
    """OFT: rows in blocks of one size. `constraint`: the largest norm per row that the skew
    matrices may have together; 0: any."""
    turn = _turns(t["oft_blocks"], constraint * len(weight)).swapaxes(-1, -2)
    return _blockwise(turn, weight) * t.get("rescale", np.float32(1)) - weight


def butterfly_turned(t: Arrays, constraint: float, weight: np.ndarray) -> np.ndarray:
    """BOFT: stages of OFT, one after the other, each with rows paired at twice the distance."""
    turns = _turns(t["boft_blocks"], constraint * len(weight))
    (inputs,) = weight.shape[1:]
    half, rows = turns.shape[-1] // 2, weight
    for stage, turn in enumerate(turns):
        apart = half * 2**stage
        paired = rows.reshape(-1, 2, apart, inputs).swapaxes(1, 2).reshape(weight.shape)
        turned = _blockwise(turn, paired).reshape(-1, apart, 2, inputs)
        rows = turned.swapaxes(1, 2).reshape(weight.shape)
    return rows * t.get("rescale", np.float32(1)) - weight


def inputs_turned(t: Arrays, how: Cayley, weight: np.ndarray) -> np.ndarray:
    """PEFT's OFT; `oft_R`: of each block the entries above the diagonal. One block is for all."""
    above = t["oft_R"].astype(np.float64)
    size = block_size(above.shape[1])
    skew = np.zeros((len(above), size, size))
    skew[:, *np.triu_indices(size, 1)] = above
    skew -= skew.swapaxes(1, 2)
    if how.largest is not None:
        norms = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
        limit = how.largest / math.sqrt(len(skew))
        skew = np.where(norms <= limit, skew, skew * limit / np.maximum(norms, 1e-30))
    turn = _series(skew, how.terms) if how.terms else _rotations(-skew)
    turn = np.broadcast_to(turn, (weight.shape[1] // size, size, size)).astype(np.float32)
    return _blockwise(turn, weight.T).T - weight


def inputs_butterfly_turned(t: Arrays, how: Cayley, weight: np.ndarray) -> np.ndarray:
    """PEFT's BOFT; `boft_R` (stages, blocks, size, size), `boft_s`: by what rows are multiplied."""
    blocks = t["boft_R"].astype(np.float64)
    stages, count, size, _ = blocks.shape
    turns = _rotations(0.5 * (blocks.swapaxes(-1, -2) - blocks)).astype(np.float32)
    columns = weight.T
    for stage, turn in enumerate(turns):
        # In each of so many parts, the even groups of half a block lie before the odd ones.
        even_odd = (count // 2**stage, 2, 2**stage, size // 2, len(weight))
        if stages == 1:
            columns = _blockwise(turn, columns)
            continue
        paired = columns.reshape(even_odd).swapaxes(1, 2).reshape(columns.shape)
        turned = _blockwise(turn, paired).reshape(-1, 2**stage, 2, *even_odd[3:])
        columns = turned.swapaxes(1, 2).reshape(columns.shape)
    return columns.T * t["boft_s"] - weight


def block_size(above_diagonal: int) -> int:
    """Of a square block with so many entries above the diagonal; 0 where there is none."""
    size = (1 + math.isqrt(1 + 8 * above_diagonal)) // 2
    return size if size * (size - 1) // 2 == above_diagonal else 0


def _turns(blocks: np.ndarray, limit: float) -> np.ndarray:
    """Rotations (..., size, size) in float32 of blocks whose skew parts' norm is bounded."""
    skew = blocks.astype(np.float64)
    skew = skew - skew.swapaxes(-1, -2)
    norm = np.linalg.norm(skew)
    if limit > 0 and norm > limit:
        skew *= limit / norm
    return _rotations(skew).astype(np.float32)


def _rotations(skew: np.ndarray) -> np.ndarray:
    one = np.eye(skew.shape[-1])
    return (one + skew) @ np.linalg.inv(one - skew)


def _series(skew: np.ndarray, terms: int) -> np.ndarray:
    """1 + 2 S + ... + 2 S^(n-2) + S^(n-1), which has a cubic term for n = 3 too."""
    found = np.eye(skew.shape[-1]) + 0 * skew
    if terms > 1:
        found = found + 2 * skew
    if terms > 2:
        power = skew @ skew
        found = found + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            found = found + 2 * power
        found = found + power @ skew
    return found


def _blockwise(turn: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """turn (blocks, size, size) times the rows of each block."""
    blocks, size, _ = turn.shape
    parts = rows.reshape(blocks, size, -1)
    return np.einsum("nij,njc->nic", turn, parts, optimize=True).reshape(rows.shape)
