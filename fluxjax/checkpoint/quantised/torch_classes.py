"""Tensors of PyTorch's quantising classes, taken apart: torchao's and quanto's int8 and fp8.

Source: torchao's `prototype/safetensors`; optimum-quanto's `WeightQBytesTensor`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.quantised.parts import FP8, Found, by_row, part
from fluxjax.checkpoint.tensors import Tensor

_CODES = (np.dtype(np.int8), *FP8)


def read_torchao(raw: Mapping[str, Tensor]) -> Iterator[Found]:
    """`X._weight_qdata`, `X._weight_scale` and, all 0 if symmetric, `X._weight_zero_point`."""
    for name in raw:
        if not name.endswith("_weight_qdata"):
            continue
        start = name.removesuffix("qdata")
        weight = start.removesuffix("_weight_") + "weight"
        scale, zero = f"{start}scale", f"{start}zero_point"
        if raw[name].dtype not in _CODES:
            raise ValueError(
                f"{weight} is quantised by torchao to {raw[name].dtype} "
                f"{list(raw[name].shape)}; only int8 and fp8 are read"
            )
        part(raw, scale, weight)
        shifts = zero in raw and bool(np.any(np.asarray(raw[zero].read()).astype(np.float32)))
        tensor = _values(raw, name, scale, zero if shifts else None)
        yield Found(weight, tensor, tuple(n for n in (name, scale, zero) if n in raw))


def read_quanto(raw: Mapping[str, Tensor]) -> Iterator[Found]:
    """`X.weight._data` and `X.weight._scale`. Scales of activations, which norms have too, are not
    needed."""
    activations = [name for name in raw if name.endswith((".input_scale", ".output_scale"))]
    for name in raw:
        if not name.endswith("weight._data") and not name.endswith("weight._data._data"):
            continue
        weight = name[: name.index("._data")]
        scale = f"{weight}._scale"
        if raw[name].dtype not in _CODES or f"{weight}._shift" in raw:
            raise ValueError(
                f"{weight} is quantised by quanto to less than 8 bits, which is not "
                "read: only its int8 and fp8 are"
            )
        part(raw, scale, weight)
        yield Found(weight, _values(raw, name, scale), (name, scale, *activations))


def _values(raw: Mapping[str, Tensor], name: str, scale: str, zero: str | None = None) -> Tensor:
    """(code - zero point) x scale, float32: of matrices and convolutions, which quanto takes too.

    Raises ValueError for scales that are neither one, nor one for each row or group of its columns.
    """
    codes = raw[name]
    if len(codes.shape) < 2 or not all(codes.shape):
        raise ValueError(f"{name} is {codes.dtype} {list(codes.shape)}, no weight of a layer")
    if not jnp.issubdtype(raw[scale].dtype, jnp.floating):
        raise ValueError(f"{scale} is {raw[scale].dtype}, and should be of floats")
    for each in (scale, zero):
        if each is not None and not _groups(codes, raw[each]):
            raise ValueError(
                f"{each} {list(raw[each].shape)} does not fit {name} {list(codes.shape)}: one "
                "scale, or one for each row or group of its columns"
            )
    if zero is None and len(codes.shape) == 2 and _groups(codes, raw[scale]) == 1:
        return by_row(codes, raw[scale], (name, scale))
    shifts = None if zero is None else raw[zero]
    rows = partial(_decoded_rows, codes, raw[scale], shifts)
    return Tensor(codes.shape, np.dtype(np.float32), rows, codes.by_rows)


def _groups(codes: Tensor, scale: Tensor) -> int:
    """How many scales a row has; 0 for those that do not fit."""
    rows, shape = codes.shape[0], scale.shape
    if scale.size == 1 or (scale.size == rows and shape[0] == rows):
        return 1
    grouped = scale.size and len(codes.shape) == len(shape) == 2 and shape[0] == rows
    return shape[1] if grouped and codes.shape[1] % shape[1] == 0 else 0


def _decoded_rows(
    codes: Tensor, scale: Tensor, zero: Tensor | None, start: int, stop: int
) -> np.ndarray:
    values = codes.rows(start, stop).astype(np.float32)
    if zero is not None:
        values -= _for_rows(codes, zero, start, stop)
    return values * _for_rows(codes, scale, start, stop)


def _for_rows(codes: Tensor, scale: Tensor, start: int, stop: int) -> np.ndarray:
    """Scales of all the codes of these rows, float32."""
    groups = _groups(codes, scale)
    values = np.asarray(scale.read()).astype(np.float32).reshape(-1, groups)
    values = np.broadcast_to(values, (codes.shape[0], groups))[start:stop]
    if groups > 1:
        values = np.repeat(values, codes.shape[1] // groups, axis=1)
    return values.reshape(*values.shape, *(1 for _ in codes.shape[2:]))
