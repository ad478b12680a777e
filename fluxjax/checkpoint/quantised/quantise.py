"""Matrices to codes: int8, fp8, nf4 and block types of GGUF, a few rows at a time.

Rounded to nearest; the K types try several ranges for each sub-block and keep the best fit, by
weighted least squares for scale and minimum. numpy only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from fluxjax.checkpoint.tensors import AT_ONCE, Tensor, unpacked
from fluxjax.config import ConfigError
from fluxjax.models.gguf_blocks import BLOCK_TYPES
from fluxjax.models.quantised import GROUP, LEVELS, Quantised

_LARGEST_FP8 = 448
_LARGEST_HALF = 65504
_TRIED = np.linspace(0.8, 1.05, 11, dtype=np.float32)  # parts of the full range


def quantised(tensor: Tensor, kind: str, called: str = "a matrix") -> Tensor | None:
    """The same matrix with codes of `kind`, one of KINDS; its own where it has them already.

    None where rows are not whole blocks of that kind. Reading it raises ConfigError, with the name
    that it is `called` by, where GGUF's blocks cannot hold a value.
    """
    name = kind.upper() if kind.upper() in BLOCK_TYPES else kind
    block = BLOCK_TYPES[name].elements if name in BLOCK_TYPES else GROUP if kind == "nf4" else 1
    if len(tensor.shape) != 2 or tensor.shape[1] % block:
        return None
    if tensor.packed is not None and tensor.packed.kind == name:
        return tensor
    return unpacked(_packed(tensor, name, called), tensor.dtype)


def _packed(tensor: Tensor, name: str, called: str) -> Quantised:
    rows, columns = tensor.shape

    def part(width: int, dtype: Any, change: Callable[[np.ndarray], np.ndarray]) -> Tensor:
        def read(a: int, b: int) -> np.ndarray:
            step = max(1, AT_ONCE // columns if tensor.by_rows else b - a)
            out = np.empty((b - a, width), dtype)
            for start in range(a, b, step):
                values = tensor.rows(start, min(start + step, b)).astype(np.float32)
                out[start - a : start - a + len(values)] = change(values)
            return out

        return Tensor((rows, width), np.dtype(dtype), read, tensor.by_rows)

    if name in BLOCK_TYPES:
        kind, make = BLOCK_TYPES[name], BLOCKS[name]
        width = columns // kind.elements * kind.size

        def blocks(x: np.ndarray) -> np.ndarray:
            if (largest := np.abs(x).max(initial=0)) > _LARGEST_HALF:
                raise ConfigError(
                    f"{called} holds {largest:g}; scales of {name} are float16, at most "
                    f"{_LARGEST_HALF}: int8, fp8 and nf4 hold larger values"
                )
            return make(x.reshape(-1, kind.elements)).reshape(len(x), width)

        return Quantised(name, {"blocks": part(width, np.uint8, blocks)})
    if name == "int8":
        codes = part(columns, np.int8, lambda x: _whole(x, _absmax(x)))
        return Quantised(name, {"codes": codes, "absmax": part(1, np.float32, _absmax)})
    if name == "fp8":
        return _fp8(tensor, part)
    absmax = part(columns // GROUP, np.float32, lambda x: _absmax(_groups(x))[..., 0])
    return Quantised(name, {"codes": part(columns // 2, np.uint8, _four_bits), "absmax": absmax})


def _fp8(tensor: Tensor, part: Callable[..., Tensor]) -> Quantised:
    """One scale for all, so that the largest value is fp8's largest."""

    @cache
    def scale() -> np.float32:
        largest = max(float(np.abs(x.astype(np.float32)).max()) for x in tensor.blocks())
        return np.float32(largest / _LARGEST_FP8 or 1)

    def codes(x: np.ndarray) -> np.ndarray:
        return (x / scale()).astype(ml_dtypes.float8_e4m3fn)

    return Quantised(
        "fp8",
        {
            "codes": part(tensor.shape[1], ml_dtypes.float8_e4m3fn, codes),
            "scale": part(1, np.float32, lambda x: np.full((len(x), 1), scale())),
        },
    )


def _groups(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1, GROUP)


def _absmax(x: np.ndarray) -> np.ndarray:
    return np.abs(x).max(-1, keepdims=True)


def _inverse(x: np.ndarray) -> np.ndarray:
    """1 / x, and 0 for 0."""
    return np.divide(1, x, out=np.zeros_like(x), where=x != 0)


def _whole(x: np.ndarray, absmax: np.ndarray) -> np.ndarray:
    return np.rint(x * (127 * _inverse(absmax))).astype(np.int8)


def _four_bits(x: np.ndarray) -> np.ndarray:
    levels = np.asarray(LEVELS["nf4"], np.float32)
    groups = _groups(x)
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, groups * _inverse(_absmax(groups)))
    codes = codes.astype(np.uint8).reshape(len(x), -1)
    return codes[:, ::2] << 4 | codes[:, 1::2]


# Blocks (n, elements) float32 -> (n, bytes).


def _half(x: np.ndarray) -> np.ndarray:
    """(n,) -> (n, 2) bytes."""
    return np.ascontiguousarray(x.astype(np.float16)).view(np.uint8).reshape(len(x), 2)


def _pairs(codes: np.ndarray) -> np.ndarray:
    """(..., 2 n): the first half of them in the low nibbles."""
    half = codes.shape[-1] // 2
    return codes[..., :half] | codes[..., half:] << 4


def _away(x: np.ndarray) -> np.ndarray:
    """Rounded, halves away from zero, as C does."""
    return np.trunc(x + np.copysign(np.float32(0.5), x))


def _q8_0(x: np.ndarray) -> np.ndarray:
    d = _absmax(x) / 127
    codes = _away(x * _inverse(d)).astype(np.int8)
    return np.hstack([_half(d[:, 0]), codes.view(np.uint8)])


def _q4_0(x: np.ndarray) -> np.ndarray:
    largest = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)
    d = largest / -8
    codes = np.trunc(x * _inverse(d) + np.float32(8.5)).clip(0, 15).astype(np.uint8)
    return np.hstack([_half(d[:, 0]), _pairs(codes)])


def _fitted(x: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, subs, 32) -> scales and minima, neither negative: x = scale code - minimum.

    Larger values weigh more: errors there reach more of the output.
    """
    weights = np.sqrt((x * x).mean(-1, keepdims=True)) + np.abs(x)
    low = np.minimum(x.min(-1, keepdims=True), 0)
    best = np.full(low.shape, np.inf, np.float32)
    scale, least = np.zeros_like(low), np.zeros_like(low)
    total, first = weights.sum(-1, keepdims=True), (weights * x).sum(-1, keepdims=True)
    for part in _TRIED:
        step = (x.max(-1, keepdims=True) - low) * part / top
        codes = np.rint((x - low) * _inverse(step)).clip(0, top)
        sums = (weights * codes).sum(-1, keepdims=True)
        squares = (weights * codes * codes).sum(-1, keepdims=True)
        product = (weights * codes * x).sum(-1, keepdims=True)
        inverse = _inverse(total * squares - sums * sums)
        slope = (total * product - sums * first) * inverse
        offset = (squares * first - sums * product) * inverse
        # Where the best minimum would be positive there is none; nor one line through equal codes.
        same = codes.max(-1, keepdims=True) == codes.min(-1, keepdims=True)
        above = (offset > 0) | same
        slope = np.where(above, product * _inverse(squares), slope)
        offset = np.where(above, 0, offset)
        offset = np.where(same & (squares == 0), first * _inverse(total), offset)
        error = (weights * (slope * codes + offset - x) ** 2).sum(-1, keepdims=True)
        better = (error < best) & ((slope > 0) | same)
        best = np.where(better, error, best)
        scale, least = np.where(better, slope, scale), np.where(better, -offset, least)
    return scale[..., 0], least[..., 0]


def _with_minima(x: np.ndarray, top: int) -> tuple[np.ndarray, ...]:
    """d, dmin (n,) in float16; 6-bit scales and minima (n, 8); codes (n, 8, 32)."""
    x = x.reshape(-1, 8, 32)
    scale, least = _fitted(x, top)
    d, dmin = ((v.max(-1) / 63).astype(np.float16) for v in (scale, least))
    df, mf = (v.astype(np.float32)[:, None] for v in (d, dmin))
    sc = np.rint(scale * _inverse(df)).clip(0, 63).astype(np.uint8)
    mn = np.rint(least * _inverse(mf)).clip(0, 63).astype(np.uint8)
    codes = (x + (mf * mn)[..., None]) * _inverse(df * sc)[..., None]
    return d, dmin, sc, mn, np.rint(codes).clip(0, top).astype(np.uint8)


def _six_bits(sc: np.ndarray, mn: np.ndarray) -> np.ndarray:
    low, high = slice(0, 4), slice(4, 8)
    return np.hstack(
        [
            sc[:, low] | (sc[:, high] >> 4) << 6,
            mn[:, low] | (mn[:, high] >> 4) << 6,
            (sc[:, high] & 15) | (mn[:, high] & 15) << 4,
        ]
    )


def _q4_k(x: np.ndarray) -> np.ndarray:
    d, dmin, sc, mn, codes = _with_minima(x, 15)
    nibbles = _pairs(codes.reshape(len(x), 4, 64)).reshape(len(x), 128)
    return np.hstack([_half(d), _half(dmin), _six_bits(sc, mn), nibbles])


def _q5_k(x: np.ndarray) -> np.ndarray:
    d, dmin, sc, mn, codes = _with_minima(x, 31)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    high = np.bitwise_or.reduce((codes >> 4) << shifts, axis=1)
    nibbles = _pairs((codes & 15).reshape(len(x), 4, 64)).reshape(len(x), 128)
    return np.hstack([_half(d), _half(dmin), _six_bits(sc, mn), high, nibbles])


def _q6_k(x: np.ndarray) -> np.ndarray:
    x = x.reshape(-1, 16, 16)
    best = np.full((*x.shape[:2], 1), np.inf, np.float32)
    scale = np.zeros_like(best)
    largest = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)
    for part in _TRIED:
        codes = np.rint(x * _inverse(largest / -32 * part)).clip(-32, 31)
        slope = (x * x * codes * x).sum(-1, keepdims=True) * _inverse(
            (x * x * codes * codes).sum(-1, keepdims=True)
        )
        error = (x * x * (slope * codes - x) ** 2).sum(-1, keepdims=True)
        scale, best = np.where(error < best, slope, scale), np.minimum(error, best)
    scale = scale[..., 0]
    extreme = np.take_along_axis(scale, np.abs(scale).argmax(-1, keepdims=True), -1)
    d = (extreme[:, 0] / -128).astype(np.float16)
    df = d.astype(np.float32)[:, None]
    sc = np.rint(scale * _inverse(df)).clip(-128, 127).astype(np.int8)
    codes = np.rint(x * _inverse(df * sc)[..., None]).clip(-32, 31) + 32
    codes = codes.astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = codes & 15, codes >> 4
    ql = low[:, :, :2] | low[:, :, 2:] << 4
    shifts = 2 * np.arange(4, dtype=np.uint8)[:, None]
    qh = np.bitwise_or.reduce(high << shifts, axis=2)
    return np.hstack([ql.reshape(-1, 128), qh.reshape(-1, 64), sc.view(np.uint8), _half(d)])


BLOCKS = {"Q8_0": _q8_0, "Q6_K": _q6_k, "Q5_K": _q5_k, "Q4_K": _q4_k, "Q4_0": _q4_0}
