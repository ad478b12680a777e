"""What the forms share: a weight that was found with all the names it consists of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from fluxjax.checkpoint.tensors import Tensor, of_whole, unpacked
from fluxjax.json_input import parse_json
from fluxjax.models.gguf_blocks import BLOCK_TYPES
from fluxjax.models.quantised import LEVELS, Quantised

FP8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
_MAX_JSON = 2**16


@dataclass(frozen=True)
class Found:
    """`name`: of the weight, whose values `tensor` reads; `used`: the names it consists of."""

    name: str
    tensor: Tensor
    used: tuple[str, ...]


def part(raw: Mapping[str, Tensor], name: str, of: str) -> Tensor:
    """Raises ValueError where a part of a quantised weight is missing."""
    if name not in raw:
        raise ValueError(f"{of} is quantised, and {name} is missing")
    return raw[name]


def json_object(raw: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """A JSON object that a file keeps as bytes. Raises ValueError."""
    tensor = raw[name]
    if tensor.dtype.itemsize != 1 or tensor.size > _MAX_JSON:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not the bytes of a text")
    try:
        values = parse_json(tensor.read().tobytes())
    except ValueError as error:
        raise ValueError(f"{name} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name} should hold a JSON object")
    return values


def small(tensor: Tensor, name: str, *sizes: int) -> np.ndarray:
    """All values in float32, flat. Raises ValueError unless there are as many as one of `sizes`."""
    if tensor.size not in sizes:
        raise ValueError(
            f"{name} {list(tensor.shape)} should have {' or '.join(map(str, sizes))} values"
        )
    return np.asarray(tensor.read()).astype(np.float32).reshape(-1)


def matrix(tensor: Tensor, name: str, *dtypes: np.dtype) -> Tensor:
    """Raises ValueError for what is no matrix of one of the types."""
    if len(tensor.shape) != 2 or tensor.dtype not in dtypes or not all(tensor.shape):
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not a matrix of {wanted}")
    return tensor


def by_row(
    codes: Tensor, scale: Tensor, names: tuple[str, str], *, scale_name: str = "scale"
) -> Tensor:
    """int8 or fp8 codes with one scale, or one for each row; float32."""
    kind = "int8" if codes.dtype == np.int8 else "fp8"
    matrix(codes, names[0], np.dtype(np.int8), *FP8)
    if scale.size not in (1, codes.shape[0]):
        raise ValueError(
            f"{names[1]} {list(scale.shape)} does not fit {names[0]} "
            f"{list(codes.shape)}: one scale, or one for each row"
        )
    return unpacked(Quantised(kind, {"codes": codes, scale_name: column(scale, codes.shape[0])}))


def column(scale: Tensor, rows: int) -> Tensor:
    """(rows, 1) float32 of one scale, or of one for each row."""

    def read(start: int, stop: int) -> np.ndarray:
        values = np.asarray(scale.read()).astype(np.float32).reshape(-1)
        return np.broadcast_to(values, (rows,))[start:stop, None]

    return Tensor((rows, 1), np.dtype(np.float32), read, by_rows=True)


def regrouped(tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """Another division into rows of values that lie one after the other."""
    if math.prod(tensor.shape[1:]) != 1:
        return of_whole(shape, tensor.dtype, lambda: tensor.read().reshape(shape))
    width = shape[1]
    return Tensor(
        shape,
        tensor.dtype,
        lambda a, b: tensor.rows(a * width, b * width).reshape(b - a, width),
        tensor.by_rows,
    )


def codes_of(tensor: Tensor) -> Quantised | None:
    """The codes that a matrix has in its file; of fp8 without a scale the values themselves."""
    if tensor.packed is not None or tensor.dtype not in FP8 or len(tensor.shape) != 2:
        return tensor.packed
    one = Tensor((1,), np.dtype(np.float32), lambda a, b: np.ones(b - a, np.float32))
    return Quantised("fp8", {"codes": tensor, "scale": column(one, tensor.shape[0])})


def codes_of_parts(kind: str, parts: Mapping[str, Tensor]) -> Quantised:
    """Codes by their parts. Raises ValueError where these do not fit the kind or each other."""
    packed = Quantised(kind, dict(parts))
    if not _fit(packed):
        found = ", ".join(f"{name} {part.dtype} {list(part.shape)}" for name, part in parts.items())
        raise ValueError(f"no codes of the kind {kind[:40]!r} consist of {found}")
    return packed


# Types of the codes, and names of what scales them.
_PARTS = {
    "int8": ((np.dtype(np.int8),), ("absmax", "scale")),
    "fp8": (FP8, ("scale",)),
    **dict.fromkeys(LEVELS, ((np.dtype(np.uint8),), ("absmax",))),
}


def _fit(packed: Quantised) -> bool:
    kind, parts = packed.kind, dict(packed.parts)
    codes = parts.pop("blocks" if kind in BLOCK_TYPES else "codes", None)
    if codes is None or len(codes.shape) not in (2, 3) or not all(codes.shape):
        return False
    if kind in BLOCK_TYPES:
        whole = codes.shape[-1] % BLOCK_TYPES[kind].size == 0
        return not parts and codes.dtype == np.uint8 and whole
    dtypes, names = _PARTS.get(kind, ((), ()))
    if codes.dtype not in dtypes or len(parts) != 1 or not parts.keys() <= set(names):
        return False
    ((*rows, groups),) = (part.shape or (0,) for part in parts.values())
    shared = packed.columns % max(groups, 1) == 0 if kind in LEVELS else groups == 1
    floats = all(part.dtype == np.float32 for part in parts.values())
    return floats and groups > 0 and shared and tuple(rows) == codes.shape[:-1]


def form_of(packed: Quantised) -> tuple[Any, ...]:
    """Kind, shapes and types of one layer's parts, by which layers may be stacked."""
    parts = sorted(packed.parts.items())
    return packed.kind, *((name, tuple(part.shape[-2:]), part.dtype) for name, part in parts)
