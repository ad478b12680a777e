"""Tensors of PyTorch's quantising classes, taken apart: torchao's and quanto's int8 and fp8.

Source: torchao's `prototype/safetensors`; optimum-quanto's `WeightQBytesTensor`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from fluxjax.checkpoint.quantised.parts import FP8, Found, by_row, column, matrix, part
from fluxjax.checkpoint.tensors import Tensor

_INT8 = np.dtype(np.int8)


def read_torchao(raw: Mapping[str, Tensor]) -> Iterator[Found]:
    """`X._weight_qdata`, `X._weight_scale` and, all 0 if symmetric, `X._weight_zero_point`."""
    for name in raw:
        if not name.endswith("_weight_qdata"):
            continue
        start = name.removesuffix("qdata")
        weight = start.removesuffix("_weight_") + "weight"
        scale, zero = f"{start}scale", f"{start}zero_point"
        codes = raw[name]
        if codes.dtype not in (_INT8, *FP8) or len(codes.shape) != 2:
            raise ValueError(
                f"{weight} is quantised by torchao to {codes.dtype} "
                f"{list(codes.shape)}; only int8 and fp8 are read"
            )
        tensor = by_row(codes, part(raw, scale, weight), (name, scale))
        used = tuple(n for n in (name, scale, zero) if n in raw)
        if zero in raw and np.any(np.asarray(raw[zero].read()).astype(np.float32)):
            tensor = _shifted(codes, raw[scale], raw[zero], zero)
        yield Found(weight, tensor, used)


def _shifted(codes: Tensor, scale: Tensor, zero: Tensor, name: str) -> Tensor:
    """(code - zero point) x scale."""
    matrix(codes, name, _INT8, *FP8)
    if zero.size not in (1, codes.shape[0]):
        raise ValueError(f"{name} {list(zero.shape)} does not fit {list(codes.shape)}")
    scales, zeros = (column(each, codes.shape[0]) for each in (scale, zero))

    def rows(a: int, b: int) -> np.ndarray:
        return (codes.rows(a, b).astype(np.float32) - zeros.rows(a, b)) * scales.rows(a, b)

    return Tensor(codes.shape, np.dtype(np.float32), rows, by_rows=True)


def read_quanto(raw: Mapping[str, Tensor]) -> Iterator[Found]:
    """`X.weight._data` and `X.weight._scale`; scales of activations are not needed."""
    for name in raw:
        if not name.endswith("weight._data") and not name.endswith("weight._data._data"):
            continue
        weight = name[: name.index("._data")]
        scale = f"{weight}._scale"
        if raw[name].dtype not in (_INT8, *FP8) or f"{weight}._shift" in raw:
            raise ValueError(
                f"{weight} is quantised by quanto to less than 8 bits, which is not "
                "read: only its int8 and fp8 are"
            )
        tensor = by_row(raw[name], part(raw, scale, weight), (name, scale))
        module = weight.removesuffix("weight")
        extras = (f"{module}{end}_scale" for end in ("input", "output"))
        yield Found(weight, tensor, (name, scale, *(extra for extra in extras if extra in raw)))
