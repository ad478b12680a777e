"""What a conversion must remember so that going back gives the very same tensors.

Other names of the same tensor, small buffers that are no parameters, and the scales of scaled
fp8. Kept as JSON: in `fluxjax_source.json` of a folder, in the metadata of a single file.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fluxjax.checkpoint.quantised.parts import column
from fluxjax.checkpoint.safetensors_file import DTYPES, dtype_name
from fluxjax.checkpoint.tensors import Tensor, astype, of_array
from fluxjax.models.quantised import Quantised
from fluxjax.networks import NETWORKS

RECORD_FILE = "fluxjax_source.json"
METADATA_KEY = "fluxjax"
_SCALES = ("scale_weight", "weight_scale")
_INPUT_SCALES = ("scale_input", "input_scale")
_OF_FP8 = re.compile(
    r"(.*\.)?(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale|comfy_quant)"
)
_DIALECTS = {one.name for network in NETWORKS.values() for one in network.dialects}
_FP8 = (DTYPES["F8_E4M3"], DTYPES["F8_E5M2"])


@dataclass(frozen=True)
class Record:
    """`renamed`: published name -> theirs. `doubled`: theirs -> the published name it repeats.

    `extras`: tensors of theirs that are no parameters, in the names of `dialect`.
    `scaled`: names of theirs whose weights were fp8 with a scale -> their dtype.
    """

    dialect: str = "published"
    renamed: Mapping[str, str] = field(default_factory=dict)
    doubled: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    scaled: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.renamed or self.doubled or self.extras or self.scaled)

    def to_json(self) -> dict[str, Any]:
        extras = {
            name: {
                "dtype": dtype_name(tensor.dtype),
                "shape": list(tensor.shape),
                "data": base64.b64encode(np.ascontiguousarray(tensor.read()).tobytes()).decode(),
            }
            for name, tensor in self.extras.items()
        }
        return {
            "dialect": self.dialect,
            "renamed": dict(self.renamed),
            "doubled": dict(self.doubled),
            "extras": extras,
            "scaled": dict(self.scaled),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        """Raises ValueError if these are not the values of `to_json`."""
        try:
            extras = {}
            for name, entry in values["extras"].items():
                data = np.frombuffer(base64.b64decode(entry["data"]), DTYPES[entry["dtype"]])
                extras[str(name)] = of_array(data.reshape(entry["shape"]))
            maps = [dict(values[key]) for key in ("renamed", "doubled", "scaled")]
            if not all(isinstance(v, str) for m in maps for v in m.values()):
                raise TypeError
            renamed, doubled, scaled = maps
            dialect = values["dialect"]
            dialect = "published" if dialect == "reference" else dialect  # as older files have it
            if dialect not in _DIALECTS or any(
                DTYPES[dtype] not in _FP8 for dtype in scaled.values()
            ):
                raise ValueError
            return cls(dialect, renamed, doubled, extras, scaled)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise ValueError("the record of the conversion's source is damaged") from None

    def restore(self, tensors: Mapping[str, Tensor], dialect: str, fp8: bool) -> dict[str, Tensor]:
        """Tensors of a file in `dialect` with names, buffers and (`fp8`) scales as they were.

        Raises ValueError where the record names what is not there, or is there already.
        """
        if dialect != self.dialect:
            return dict(tensors)
        added = [*self.renamed.values(), *self.doubled, *self.extras]
        needed = {*self.renamed, *self.doubled.values(), *self.scaled}
        if len({*added}) < len(added) or any(name in tensors for name in added):
            raise ValueError("it gives a name to two tensors")
        if missing := sorted(needed - tensors.keys() - {*added}):
            raise ValueError(f"it names {missing[0]!r}, which is no tensor of it")
        restored = {self.renamed.get(name, name): tensor for name, tensor in tensors.items()}
        restored |= {name: tensors[same] for name, same in self.doubled.items() if same in tensors}
        for name, dtype in self.scaled.items() if fp8 else ():
            if name in restored and restored[name].dtype not in _FP8:
                restored[name] = _quantise(restored[name], self._scale(name), DTYPES[dtype], name)
        extras = {k: v for k, v in self.extras.items() if fp8 or not _OF_FP8.fullmatch(k)}
        return restored | extras

    def _scale(self, name: str) -> Tensor:
        return _scale_of(name, self.extras)[0]


def _scale_of(weight: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, str]:
    module = weight.removesuffix("weight")
    names = [module + scale for scale in _SCALES if module + scale in tensors]
    if not names:
        raise ValueError(f"{weight!r} is said to be scaled, and its scale is missing")
    return tensors[names[0]], names[0]


def is_fp8_extra(name: str) -> bool:
    """Whether this is a scale or mark of fp8 files, and no weight."""
    return _OF_FP8.fullmatch(name) is not None


def dequantise(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """ComfyUI's scaled fp8 as bfloat16: fp8 x scale, multiplied in float32.

    Returns the tensors without scales and markers, and the dtypes of those that were scaled.
    bfloat16 keeps 8 bits where fp8 had 4, so that quantising again with the scale is exact.
    Raises ValueError for quantisations other than fp8.
    """
    plain = {name: t for name, t in tensors.items() if not is_fp8_extra(name)}
    scaled: dict[str, str] = {}
    for name in tensors:
        module, _, kind = name.rpartition(".")
        weight = f"{module}.weight"
        if kind == "weight_scale_2" or (
            kind == "comfy_quant" and b"float8" not in tensors[name].read().tobytes()[:4096]
        ):
            raise ValueError(f"{module} is quantised in a way that is not read; only fp8 is")
        if kind in (*_SCALES, *_INPUT_SCALES) and weight not in tensors:
            raise ValueError(f"{name} scales {weight}, which the file does not hold")
        if kind == "comfy_quant" and tensors.get(weight, tensors[name]).dtype in _FP8:
            _scale_of(weight, tensors)
        if kind not in _SCALES:
            continue
        if all(f"{module}.{spelling}" in tensors for spelling in _SCALES):
            raise ValueError(f"{weight} has a {' and a '.join(_SCALES)}, and should have one")
        if tensors[weight].dtype in _FP8:
            scaled[weight] = dtype_name(tensors[weight].dtype)
            plain[weight] = _dequantised(tensors[weight], tensors[name], weight)
        elif not np.all(tensors[name].read().astype(np.float32) == 1):
            raise ValueError(f"{name} scales {weight}, which is {tensors[weight].dtype}, not fp8")
    return plain, scaled


def _factors(scale: Tensor, weight: Tensor, start: int, stop: int) -> np.ndarray:
    """float32, to multiply rows [start, stop) with: one for all, or one per row."""
    factors = scale.read().astype(np.float32).reshape(-1)
    if factors.size == 1:
        return factors.reshape((1,) * len(weight.shape))
    return factors[start:stop].reshape(-1, *(1,) * (len(weight.shape) - 1))


def _require_fit(scale: Tensor, weight: Tensor, name: str) -> None:
    if scale.size != 1 and (not weight.shape or scale.size != weight.shape[0]):
        raise ValueError(
            f"the scale {list(scale.shape)} of {name} {list(weight.shape)} does not fit it: one "
            "scale, or one for each row"
        )


def _dequantised(weight: Tensor, scale: Tensor, name: str) -> Tensor:
    _require_fit(scale, weight, name)
    dtype = DTYPES["BF16"]

    def rows(start: int, stop: int) -> np.ndarray:
        values = weight.rows(start, stop).astype(np.float32)
        values *= _factors(scale, weight, start, stop)
        return values.astype(dtype)

    packed = None
    if len(weight.shape) == 2:
        packed = Quantised("fp8", {"codes": weight, "scale": column(scale, weight.shape[0])})
    return Tensor(weight.shape, dtype, rows, weight.by_rows, packed)


def _quantise(weight: Tensor, scale: Tensor, dtype: np.dtype, name: str) -> Tensor:
    _require_fit(scale, weight, name)
    wide = astype(weight, np.dtype(np.float32))

    def rows(start: int, stop: int) -> np.ndarray:
        return (wide.rows(start, stop) / _factors(scale, weight, start, stop)).astype(dtype)

    return Tensor(weight.shape, dtype, rows, weight.by_rows)
