"""The block types of GGUF: what the bytes of a row of weights stand for.

Written once for numpy and for JAX: an array's own namespace computes. Bytes are (..., size of a
block), values (..., elements of a block) in float32. In the layouts `d` and `m` are float16.
Source: the layouts of ggml's `ggml-common.h`; operations in the order of the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# IQ4's levels.
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class BlockType:
    """`number`: in files. A block of `elements` values takes `size` bytes; at `halves` begin the
    float16 that scale it."""

    number: int
    elements: int
    size: int
    decode: Callable[[Any], Any]
    halves: tuple[int, ...] = (0,)


def decode_blocks(name: str, rows: Any) -> Any:
    """(..., bytes of a row) uint8 -> (..., elements of a row) float32."""
    kind = BLOCK_TYPES[name]
    blocks = rows.reshape(*rows.shape[:-1], -1, kind.size)
    values = kind.decode(blocks)
    return values.reshape(*rows.shape[:-1], -1)


def _floats(x: Any) -> Any:
    return x.astype(np.float32)


def _half(x: Any) -> Any:
    """(..., 2) bytes -> (..., 1)."""
    return _floats(x.view(np.float16))


def _signed(x: Any) -> Any:
    return _floats(x.view(np.int8))


def _split(x: Any, *shape: int) -> Any:
    return x.reshape(*x.shape[:-1], *shape)


def _join(*parts: Any) -> Any:
    return parts[0].__array_namespace__().concatenate(parts, axis=-1)


def _stack(parts: list[Any], axis: int) -> Any:
    return parts[0].__array_namespace__().stack(parts, axis=axis)


def _nibbles(x: Any) -> Any:
    """All low ones, then all high ones."""
    return _join(x & 15, x >> 4)


def _bits(x: Any, count: int, width: int) -> Any:
    """(..., n) -> (..., count, n): `width` bits of every element, from the lowest up."""
    return _stack([(x >> (width * i)) & (2**width - 1) for i in range(count)], -2)


def _levels(x: Any) -> Any:
    return x.__array_namespace__().asarray(LEVELS, dtype=np.float32)[x]


def _q8_0(b: Any) -> Any:
    return _half(b[..., :2]) * _signed(b[..., 2:])


def _q4_0(b: Any) -> Any:
    return _half(b[..., :2]) * (_floats(_nibbles(b[..., 2:])) - 8)


def _q4_1(b: Any) -> Any:
    return _half(b[..., :2]) * _floats(_nibbles(b[..., 4:])) + _half(b[..., 2:4])


def _fifth(b: Any, low: Any) -> Any:
    """4-bit codes with the bits of four bytes above them."""
    bits = b.view(np.uint32)
    high = _join(*((bits >> i) & 1 for i in range(32)))
    return _floats(low) + 16 * _floats(high)


def _q5_0(b: Any) -> Any:
    return _half(b[..., :2]) * (_fifth(b[..., 2:6], _nibbles(b[..., 6:])) - 16)


def _q5_1(b: Any) -> Any:
    codes = _fifth(b[..., 4:8], _nibbles(b[..., 8:]))
    return _half(b[..., :2]) * codes + _half(b[..., 2:4])


def _six_bits(s: Any) -> tuple[Any, Any]:
    """12 bytes -> eight scales, eight minima."""
    first, second, third = s[..., :4], s[..., 4:8], s[..., 8:]
    scales = _join(first & 63, (third & 15) | ((first >> 6) << 4))
    return scales, _join(second & 63, (third >> 4) | ((second >> 6) << 4))


def _with_minima(d: Any, least: Any, scales: Any, minima: Any, codes: Any) -> Any:
    """(..., subs) scales and minima, (..., subs, n) codes."""
    return (d * _floats(scales))[..., None] * _floats(codes) - (least * _floats(minima))[..., None]


def _q4_k(b: Any) -> Any:
    qs = _split(b[..., 16:], 4, 32)
    codes = _split(_join(qs & 15, qs >> 4), 2, 32).reshape(*b.shape[:-1], 8, 32)
    return _with_minima(_half(b[..., :2]), _half(b[..., 2:4]), *_six_bits(b[..., 4:16]), codes)


def _q5_k(b: Any) -> Any:
    qs = _split(b[..., 48:], 4, 32)
    low = _split(_join(qs & 15, qs >> 4), 2, 32).reshape(*b.shape[:-1], 8, 32)
    codes = low | (_bits(b[..., 16:48], 8, 1) << 4)
    return _with_minima(_half(b[..., :2]), _half(b[..., 2:4]), *_six_bits(b[..., 4:16]), codes)


def _two_bits(qs: Any) -> Any:
    """64 bytes -> (..., 256) codes."""
    return _bits(_split(qs, 2, 32), 4, 2).reshape(*qs.shape[:-1], 256)


def _q2_k(b: Any) -> Any:
    scales, codes = b[..., :16], _split(_two_bits(b[..., 16:80]), 16, 16)
    d, least = _half(b[..., 80:82]), _half(b[..., 82:84])
    return _with_minima(d, least, scales & 15, scales >> 4, codes)


def _q3_k(b: Any) -> Any:
    s = b[..., 96:108]
    high = _bits(s[..., 8:], 4, 2).reshape(*b.shape[:-1], 16)
    scales = _floats(_nibbles(s[..., :8]) | (high << 4)) - 32
    third = _bits(b[..., :32], 8, 1).reshape(*b.shape[:-1], 256)  # set: nothing is taken away
    codes = _floats(_two_bits(b[..., 32:96])) - 4 + 4 * _floats(third)
    return (_half(b[..., 108:]) * scales)[..., None] * _split(codes, 16, 16)


def _q6_k(b: Any) -> Any:
    ql = _split(b[..., :128], 2, 64)
    low = _join(ql & 15, ql >> 4)  # of each half: elements 0-63, then 64-127
    high = _bits(_split(b[..., 128:192], 2, 32), 4, 2).reshape(*low.shape)
    codes = _floats(low | (high << 4)) - 32
    scales = _half(b[..., 208:]) * _signed(b[..., 192:208])
    return scales[..., None] * codes.reshape(*b.shape[:-1], 16, 16)


def _iq4_nl(b: Any) -> Any:
    return _half(b[..., :2]) * _levels(_nibbles(b[..., 2:]))


def _iq4_xs(b: Any) -> Any:
    low, high = b[..., 4:8], b[..., 2:4].view(np.uint16)
    low = _stack([low & 15, low >> 4], -1).reshape(*b.shape[:-1], 8)
    high = _join(*((high >> (2 * i)) & 3 for i in range(8)))
    scales = _half(b[..., :2]) * (_floats(low) + 16 * _floats(high) - 32)
    return scales[..., None] * _levels(_nibbles(_split(b[..., 8:], 8, 16)))


BLOCK_TYPES = {
    "Q4_0": BlockType(2, 32, 18, _q4_0),
    "Q4_1": BlockType(3, 32, 20, _q4_1, (0, 2)),
    "Q5_0": BlockType(6, 32, 22, _q5_0),
    "Q5_1": BlockType(7, 32, 24, _q5_1, (0, 2)),
    "Q8_0": BlockType(8, 32, 34, _q8_0),
    "Q2_K": BlockType(10, 256, 84, _q2_k, (80, 82)),
    "Q3_K": BlockType(11, 256, 110, _q3_k, (108,)),
    "Q4_K": BlockType(12, 256, 144, _q4_k, (0, 2)),
    "Q5_K": BlockType(13, 256, 176, _q5_k, (0, 2)),
    "Q6_K": BlockType(14, 256, 210, _q6_k, (208,)),
    "IQ4_NL": BlockType(20, 32, 18, _iq4_nl),
    "IQ4_XS": BlockType(23, 256, 136, _iq4_xs),
}
