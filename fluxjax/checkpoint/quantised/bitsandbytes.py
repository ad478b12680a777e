"""bitsandbytes: nf4 and fp4 (scales plain, or quantised themselves) and int8 with a scale per row.

Source: `QuantState.as_dict` and `Linear8bitLt` of bitsandbytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fluxjax.checkpoint.quantised.parts import (
    Found,
    by_row,
    json_object,
    part,
    regrouped,
    small,
)
from fluxjax.checkpoint.safetensors_file import DTYPES
from fluxjax.checkpoint.tensors import Tensor, of_whole, unpacked
from fluxjax.models.quantised import LEVELS, Quantised

_STATE = re.compile(r"(?P<weight>(?:.*\.)?weight)\.quant_state\.bitsandbytes__(?P<kind>nf4|fp4)")
_VALUES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_ROWS = 0  # `weight_format`: the other orders are those of old GPUs


def read(raw: Mapping[str, Tensor]) -> Iterator[Found]:
    """Raises ValueError for parts that are missing or do not fit together."""
    for name in raw:
        if found := _STATE.fullmatch(name):
            yield _four_bits(raw, found["weight"], found["kind"], name)
        elif name == "SCB" or name.endswith(".SCB"):
            yield _int8(raw, name)


def _int8(raw: Mapping[str, Tensor], name: str) -> Found:
    weight, form = name[:-3] + "weight", name[:-3] + "weight_format"
    codes = part(raw, weight, name)
    if form in raw and small(raw[form], form, 1)[0] != _ROWS:
        raise ValueError(f"{weight} is int8 in an order of columns that only old GPUs use")
    if codes.dtype != np.int8 or raw[name].size != codes.shape[0]:
        raise ValueError(
            f"{name} {list(raw[name].shape)} does not scale {weight}, {codes.dtype} "
            f"{list(codes.shape)}"
        )
    tensor = by_row(codes, raw[name], (weight, name), scale_name="absmax")
    return Found(weight, tensor, tuple(n for n in (weight, name, form) if n in raw))


def _four_bits(raw: Mapping[str, Tensor], weight: str, kind: str, state: str) -> Found:
    values = json_object(raw, state)
    shape, block, dtype = values.get("shape"), values.get("blocksize"), values.get("dtype")
    if (
        not isinstance(shape, list)
        or not shape
        or len(shape) > 8
        or not all(type(n) is int and 0 < n < 2**40 for n in shape)
    ):
        raise ValueError(f"{state} has the shape {str(shape)[:100]}")
    if type(block) is not int or block not in _BLOCKS:
        raise ValueError(f"{state} has blocks of {str(block)[:20]}, which are not {_BLOCKS}")
    if not isinstance(dtype, str) or dtype not in _VALUES:
        raise ValueError(f"{state} has values of {str(dtype)[:20]!r}, not {' or '.join(_VALUES)}")
    stored, count = part(raw, weight, state), math.prod(shape)
    if math.prod(stored.shape[1:]) != 1 or stored.nbytes != -(-count // 2):
        raise ValueError(
            f"{weight} is {stored.dtype} {list(stored.shape)}, not the {count} values "
            f"of {state}, two to a byte"
        )
    codes = _bytes(stored)
    absmax, used = _scales(raw, weight, values, -(-count // block), state)
    levels_name = f"{weight}.quant_map"
    levels = small(part(raw, levels_name, state), levels_name, 16)
    tensor = _decoded(codes, absmax, levels, kind, tuple(shape), block, DTYPES[_VALUES[dtype]])
    return Found(weight, tensor, (weight, state, levels_name, *used))


def _bytes(tensor: Tensor) -> Tensor:
    """(bytes, 1), of numbers of any type (`bnb_4bit_quant_storage`), of which none counts."""
    width = tensor.dtype.itemsize

    def rows(start: int, stop: int) -> np.ndarray:
        first = start // width
        numbers = np.ascontiguousarray(tensor.rows(first, -(-stop // width)))
        return numbers.reshape(-1).view(np.uint8)[start - first * width :][: stop - start, None]

    return Tensor((tensor.nbytes, 1), np.dtype(np.uint8), rows, tensor.by_rows)


def _scales(
    raw: Mapping[str, Tensor], weight: str, values: dict[str, Any], count: int, state: str
) -> tuple[Tensor, tuple[str, ...]]:
    """One float32 for each block, (count,), still lazy; and the names it is made of."""
    name = f"{weight}.absmax"
    absmax = part(raw, name, state)
    if absmax.size != count or len(absmax.shape) != 1:
        raise ValueError(f"{name} {list(absmax.shape)} should have {count} values")
    nested = f"{weight}.nested_absmax"
    if nested not in raw:
        if absmax.dtype != np.float32:
            raise ValueError(f"{name} is {absmax.dtype}, and {nested} is missing")
        return absmax, (name,)
    block, offset = values.get("nested_blocksize"), values.get("nested_offset")
    if type(block) is not int or block not in _BLOCKS or type(offset) not in (int, float):
        raise ValueError(f"{state} lacks a nested_blocksize of {_BLOCKS} or the nested_offset")
    levels_name = f"{weight}.nested_quant_map"
    levels = small(part(raw, levels_name, state), levels_name, 256)
    outer = raw[nested]
    if outer.size != -(-count // block) or absmax.dtype != np.uint8:
        raise ValueError(
            f"{nested} {list(outer.shape)} does not scale {name}, {absmax.dtype} "
            f"{list(absmax.shape)}"
        )

    def rows(start: int, stop: int) -> np.ndarray:
        scales = np.asarray(outer.read()).astype(np.float32).reshape(-1)
        values = levels[absmax.rows(start, stop)] * scales[np.arange(start, stop) // block]
        return values + np.float32(offset)

    return Tensor((count,), np.dtype(np.float32), rows, by_rows=True), (name, nested, levels_name)


def _decoded(
    codes: Tensor,
    absmax: Tensor,
    levels: np.ndarray,
    kind: str,
    shape: tuple[int, ...],
    block: int,
    dtype: np.dtype,
) -> Tensor:
    width = math.prod(shape[1:])
    usual = np.array_equal(levels, np.asarray(LEVELS[kind], np.float32))
    if len(shape) == 2 and width % block == 0 and usual:
        rows = shape[0]
        packed = {
            "codes": regrouped(codes, (rows, width // 2)),
            "absmax": regrouped(absmax, (rows, width // block)),
        }
        return unpacked(Quantised(kind, packed), dtype)

    def whole() -> np.ndarray:
        packed = codes.read().reshape(-1)
        values = levels[np.stack([packed >> 4, packed & 15], -1).reshape(-1)[: math.prod(shape)]]
        values = values * np.repeat(absmax.read(), block)[: values.size]
        return values.astype(dtype).reshape(shape)

    return of_whole(shape, dtype, whole)
