"""ComfyUI's quantised layers beside fp8: int8_tensorwise (rotated or not), nvfp4 and mxfp8.

A layer's format is JSON in `X.comfy_quant`, or in the file's metadata under "layers", of which
`with_markers` makes such tensors.
Source: comfy-kitchen's layouts; the tiles of scales: cuBLAS, "1D block scaling factors layout".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from fluxjax.checkpoint.engine import listed
from fluxjax.checkpoint.quantised.parts import FP8, Found, by_row, json_object, matrix, part, small
from fluxjax.checkpoint.tensors import Tensor, of_array
from fluxjax.json_input import parse_json

METADATA_KEY = "_quantization_metadata"
_PREFIX = "model.diffusion_model."
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = np.array([*_HALF, *(-x for x in _HALF)], np.float32)
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_BYTE, _INT8 = np.dtype(np.uint8), np.dtype(np.int8)
_READ = ("int8_tensorwise", "nvfp4", "mxfp8")
_PARTS = ("weight", "weight_scale", "weight_scale_2", "input_scale", "comfy_quant")


def with_markers(raw: Mapping[str, Tensor], *metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """`raw` with a marker beside each layer that a file's metadata says to be quantised.

    The metadata may name the layers with or without the prefix that the tensors have, and layers of
    other networks that the file has no longer.
    Raises ValueError for metadata that are damaged, and, naming them, where no layer is there.
    """
    marked, lost, found = dict(raw), [], 0
    for layer, form in [pair for each in metadata for pair in _layers(each)]:
        names = (layer, layer.removeprefix(_PREFIX), f"{_PREFIX}{layer}")
        module = next((name for name in names if f"{name}.weight" in raw), None)
        found += module is not None
        if module is None:
            lost.append(layer)
        elif not _is_fp8(form.get("format")):
            text = np.frombuffer(json.dumps(form).encode(), np.uint8)
            marked.setdefault(f"{module}.comfy_quant", of_array(text))
    if lost and not found:
        raise ValueError(listed(f"are layers of its metadata {METADATA_KEY!r}, and missing", lost))
    return marked


def _layers(metadata: Mapping[str, str]) -> list[tuple[str, dict[str, Any]]]:
    if METADATA_KEY not in metadata:
        return []
    values = parse_json(metadata[METADATA_KEY].encode())
    layers = values.get("layers", {}) if isinstance(values, dict) else None
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        raise ValueError(f"its metadata under {METADATA_KEY!r} has no object of layers")
    return list(layers.items())


def read(raw: Mapping[str, Tensor]) -> Iterator[Found]:
    """Layers that are not fp8. Raises ValueError for formats that are not read, by name."""
    for weight, tensor in raw.items():
        module, _, leaf = weight.rpartition(".")
        if leaf != "weight":
            continue
        names = {name: f"{module}.{name}".removeprefix(".") for name in _PARTS}
        marker = names["comfy_quant"]
        marked = json_object(raw, marker) if marker in raw else None
        form = _format(marked, tensor, raw, names) if marked else _unmarked(tensor, raw, names)
        if not form:
            continue
        used = tuple(name for name in names.values() if name in raw)
        yield Found(weight, _decoded(form, marked, raw, names), used)


def _is_fp8(form: Any) -> bool:
    return isinstance(form, str) and form.startswith("float8")


def _format(
    marked: Mapping[str, Any], tensor: Tensor, raw: Mapping[str, Tensor], names: Mapping[str, str]
) -> str:
    form = marked.get("format")
    if form in _READ:
        return str(form)
    if _is_fp8(form):
        return ""
    raise ValueError(
        f"{names['weight']} is quantised as {str(form)[:40]!r}, which is not read; "
        f"float8, {', '.join(_READ)} are"
    )


def _unmarked(tensor: Tensor, raw: Mapping[str, Tensor], names: Mapping[str, str]) -> str:
    scale = raw.get(names["weight_scale"])
    if scale is None:
        return ""
    if tensor.dtype == _INT8:
        return "int8_tensorwise"
    if names["weight_scale_2"] in raw:
        return "nvfp4"
    return "mxfp8" if tensor.dtype in FP8 and scale.dtype in (_BYTE, _E8M0) else ""


def _decoded(
    form: str, marked: Mapping[str, Any] | None, raw: Mapping[str, Tensor], names: Mapping[str, str]
) -> Tensor:
    weight, scale = raw[names["weight"]], part(raw, names["weight_scale"], names["weight"])
    if form == "int8_tensorwise":
        matrix(weight, names["weight"], _INT8)
        tensor = by_row(weight, scale, (names["weight"], names["weight_scale"]))
        return _rotated_back(tensor, marked, names["weight"]) if marked else tensor
    if form == "mxfp8":
        matrix(weight, names["weight"], *FP8)
        scales = _block_scales(scale, weight.shape, 32, bool(marked), names["weight_scale"])[0]
        return _by_block(weight.shape, lambda a, b: weight.rows(a, b).astype(np.float32), scales)
    matrix(weight, names["weight"], _BYTE)
    shape = (weight.shape[0], 2 * weight.shape[1])
    scales, tiled = _block_scales(scale, shape, 16, bool(marked), names["weight_scale"])
    second = names["weight_scale_2"]
    factor = small(part(raw, second, names["weight"]), second, 1)[0]
    # comfy-kitchen packs the first of two into the high half; others, whose scales lie in rows,
    # into the low one.
    first, last = (4, 0) if tiled else (0, 4)

    def codes(a: int, b: int) -> np.ndarray:
        packed = weight.rows(a, b)
        pairs = np.stack([(packed >> first) & 15, (packed >> last) & 15], -1)
        return _E2M1[pairs.reshape(b - a, -1)]

    return _by_block(shape, codes, lambda: scales() * factor)


def _block_scales(
    scale: Tensor, shape: tuple[int, ...], block: int, marked: bool, name: str
) -> tuple[Callable[[], np.ndarray], bool]:
    """A reader of the scales (rows, blocks) in float32, and whether they lie in cuBLAS' tiles.

    Tiles of 128 rows and 4 blocks are what ComfyUI writes, padded with zeros.
    """
    rows, blocks = shape[0], shape[1] // block
    if shape[1] % block:
        raise ValueError(f"{name} scales rows of {shape[1]}, which are no blocks of {block}")
    padded = -(-rows // 128) * 128 * (-(-blocks // 4) * 4)
    if scale.size == padded == rows * blocks and not marked:
        raise ValueError(
            f"{name} {list(scale.shape)} may lie in rows or in tiles, which neither a comfy_quant "
            f"nor the metadata {METADATA_KEY!r} tells: take the file as it was published"
        )
    tiled = scale.size == padded and (marked or scale.size != rows * blocks)
    if not tiled and scale.size != rows * blocks:
        raise ValueError(f"{name} {list(scale.shape)} should have {rows} x {blocks} scales")

    def read() -> np.ndarray:
        values = np.asarray(scale.read())
        if values.dtype == _BYTE:
            values = values.view(_E8M0 if block == 32 else ml_dtypes.float8_e4m3fn)
        values = values.astype(np.float32)
        if not tiled:
            return values.reshape(rows, blocks)
        tiles = values.reshape(-(-rows // 128), -(-blocks // 4), 32, 4, 4)
        # In a tile: row r % 32, then r // 32, then the column.
        return tiles.transpose(0, 3, 2, 1, 4).reshape(-(-rows // 128) * 128, -1)[:rows, :blocks]

    return read, tiled


def _by_block(shape: tuple[int, ...], codes: Any, scales: Any) -> Tensor:
    """codes(a, b) gives rows of (rows, columns), scales() all of (rows, blocks)."""

    def rows(a: int, b: int) -> np.ndarray:
        factors = scales()[a:b]
        values = codes(a, b).reshape(*factors.shape, -1) * factors[..., None]
        return values.reshape(b - a, shape[1])

    return Tensor((shape[0], shape[1]), np.dtype(np.float32), rows, by_rows=True)


def _rotated_back(tensor: Tensor, marked: Mapping[str, Any], name: str) -> Tensor:
    """Weights that were multiplied by Hadamard matrices: these are their own inverse."""
    if not marked.get("convrot"):
        return tensor
    size = marked.get("convrot_groupsize", 256)
    if size not in (4, 16, 64, 256, 1024) or tensor.shape[1] % size:
        raise ValueError(f"{name} {list(tensor.shape)} is rotated in groups of {str(size)[:20]}")
    turn = hadamard(size)

    def rows(a: int, b: int) -> np.ndarray:
        values = tensor.rows(a, b)
        return (values.reshape(-1, size) @ turn).reshape(values.shape)

    return Tensor(tensor.shape, tensor.dtype, rows, by_rows=True)


def hadamard(size: int) -> np.ndarray:
    """(size, size) float32, orthonormal and symmetric; a power of 4."""
    four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32) / 2
    turn = np.ones((1, 1), np.float32)
    while len(turn) < size:
        turn = np.kron(turn, four)
    return turn
