"""Reading GGUF files: everything a header claims is bounded by the file before it is believed.

Little-endian: "GGUF", version, counts of tensors and of key-values, those, the tensors' names,
shapes (innermost first), types and offsets, and from the next multiple of the alignment their data.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fluxjax.checkpoint.safetensors_file import MAX_NAME, MAX_TENSORS, read_rows
from fluxjax.checkpoint.tensors import Tensor, of_whole, reshape, unpacked
from fluxjax.models.gguf_blocks import BLOCK_TYPES, decode_blocks
from fluxjax.models.quantised import Quantised

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MAX_HEADER_BYTES = 64 * 2**20
MAX_ITEMS = 2**20  # strings and numbers in all key-values
MAX_AXES = 5  # one more than ggml has: ComfyUI-GGUF writes convolutions over time so
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
PLAIN = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    30: np.dtype(ml_dtypes.bfloat16),
    24: np.dtype(np.int8),
    25: np.dtype(np.int16),
    26: np.dtype(np.int32),
    27: np.dtype(np.int64),
    28: np.dtype(np.float64),
}
_BLOCKS = {kind.number: name for name, kind in BLOCK_TYPES.items()}
# Types that exist and are not read, so that a refusal can name them.
_UNREAD = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."


@dataclass(frozen=True)
class _Entry:
    """`offset` from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int


class _Header:
    """The bytes of a header, taken one value after the other; never more than there are."""

    def __init__(self, path: Path):
        self.path = path
        self.size = path.stat().st_size
        with open(path, "rb") as file:
            self.data = file.read(min(self.size, MAX_HEADER_BYTES))
        self.at = 0
        self.items = 0

    def bad(self, why: str) -> ValueError:
        return ValueError(f"{self.path} is no valid GGUF file: {why}")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            if len(self.data) < self.size:
                raise self.bad(f"its header exceeds {MAX_HEADER_BYTES} bytes")
            raise self.bad(f"it is cut short: {count} bytes are due at {self.at} of {self.size}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def name(self) -> str:
        """Of a key or a tensor."""
        name = self.string()
        if len(name) > MAX_NAME or not name.isprintable():
            raise self.bad(f"a name in it has more than {MAX_NAME} or unprintable characters")
        return name

    def value(self, kind: int) -> Any:
        """A number, a string, or a list; numbers of long arrays are passed over (None)."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.bad(f"a value at byte {self.at} has the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS and count > MAX_AXES:
            self.take(count * struct.calcsize("<" + _SCALARS[kind]))
            return None
        if kind not in _SCALARS and kind != _STRING:
            raise self.bad(f"an array at byte {self.at} has items of the unknown type {kind}")
        self.items += count
        if self.items > MAX_ITEMS:
            raise self.bad(f"its arrays have more than {MAX_ITEMS} items")
        values = [self.value(kind) for _ in range(count)]
        return values if count <= MAX_AXES else None


def read_gguf(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Lazy tensors by name, quantised ones decoded to float32 as they are read; and the texts.

    A tensor that was stored in another shape (ComfyUI's tools do that) has its own one.
    Raises ValueError for anything malformed: counts, sizes and offsets that the file cannot hold,
    tensors that overlap, unknown types, doubled names.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    header = _Header(path)
    values, tensors = _counts(header)
    keys: dict[str, Any] = {}
    for _ in range(values):
        key = header.name()
        if key in keys:
            raise header.bad(f"it holds {key!r} twice")
        keys[key] = header.value(header.number("I"))
    entries = [_entry(header) for _ in range(tensors)]
    if len({entry.name for entry in entries}) < len(entries):
        raise header.bad("it gives one name to two tensors")
    alignment = keys.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 2**16 or alignment & (alignment - 1):
        raise header.bad(f"its alignment {alignment!r} is no power of two from 8 to 65536")
    start = -(-header.at // alignment) * alignment
    _check_places(header, entries, start, alignment)
    texts = {key: value for key, value in keys.items() if isinstance(value, str)}
    return {e.name: _tensor(header, e, start, keys) for e in entries}, texts


def _counts(header: _Header) -> tuple[int, int]:
    if header.take(4) != MAGIC:
        raise header.bad("it does not begin with GGUF")
    version = header.number("I")
    if version not in VERSIONS:
        turned = int.from_bytes(version.to_bytes(4, "big"), "little")
        why = ", it is big-endian" * (turned in VERSIONS)
        raise header.bad(f"its version is {version}, not 2 or 3{why}")
    tensors, values = header.number("Q"), header.number("Q")
    if tensors > MAX_TENSORS or values > MAX_TENSORS:
        raise header.bad(
            f"it claims {tensors} tensors and {values} values, of at most {MAX_TENSORS}"
        )
    return values, tensors


def _entry(header: _Header) -> _Entry:
    name = header.name()
    axes = header.number("I")
    if axes > MAX_AXES:
        raise header.bad(f"{name!r} has {axes} axes, more than {MAX_AXES}")
    shape = tuple(header.number("Q") for _ in range(axes))[::-1]
    kind, offset = header.number("I"), header.number("Q")
    count = math.prod(shape)
    if count >= 2**48 or any(size == 0 for size in shape):
        raise header.bad(f"{name!r} has the shape {list(shape)}")
    if kind in PLAIN:
        return _Entry(name, shape, kind, offset, count * PLAIN[kind].itemsize)
    if kind not in _BLOCKS:
        what = _UNREAD.get(kind, f"number {kind}")
        raise header.bad(
            f"{name!r} is of type {what}, which is not read; "
            f"F32, F16, BF16, {', '.join(BLOCK_TYPES)} are"
        )
    block = BLOCK_TYPES[_BLOCKS[kind]]
    if not shape or shape[-1] % block.elements:
        raise header.bad(
            f"a row of {name!r} {list(shape)} is no whole number of "
            f"{_BLOCKS[kind]} blocks of {block.elements}"
        )
    return _Entry(name, shape, kind, offset, count // block.elements * block.size)


def _check_places(header: _Header, entries: list[_Entry], start: int, alignment: int) -> None:
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if entry.offset % alignment:
            raise header.bad(
                f"{entry.name!r} begins at {entry.offset}, not a multiple of {alignment}"
            )
        if entry.offset < end:
            raise header.bad(f"{entry.name!r} overlaps the tensor before it")
        end = entry.offset + entry.nbytes
        if start + end > header.size:
            raise header.bad(f"{entry.name!r} ends at byte {start + end} of {header.size}")


def _tensor(header: _Header, entry: _Entry, start: int, keys: dict[str, Any]) -> Tensor:
    tensor = _stored(header.path, entry, start + entry.offset)
    shape = keys.get(_ORIGINAL_SHAPE + entry.name)
    if shape is None:
        return tensor
    if (
        not isinstance(shape, list)
        or any(type(n) is not int or n < 1 for n in shape)
        or (math.prod(shape) != tensor.size)
    ):
        raise header.bad(f"the original shape of {entry.name!r} cannot be {shape}")
    if tuple(shape) == tensor.shape:
        return tensor
    if shape[:1] == list(tensor.shape[:1]):
        return reshape(tensor, tuple(shape))
    return of_whole(tuple(shape), tensor.dtype, lambda: tensor.read().reshape(shape))


def _stored(path: Path, entry: _Entry, offset: int) -> Tensor:
    if entry.type in PLAIN:
        dtype = PLAIN[entry.type]
        rows = partial(read_rows, path, offset, entry.shape, dtype)
        return Tensor(entry.shape, dtype, rows, by_rows=True)
    name = _BLOCKS[entry.type]
    row = entry.shape[-1] // BLOCK_TYPES[name].elements * BLOCK_TYPES[name].size
    shape, dtype = (math.prod(entry.shape[:-1]), row), np.dtype(np.uint8)
    blocks = Tensor(shape, dtype, partial(read_rows, path, offset, shape, dtype), by_rows=True)
    if len(entry.shape) == 2:
        return unpacked(Quantised(name, {"blocks": blocks}))
    return of_whole(
        entry.shape, np.float32, lambda: decode_blocks(name, blocks.read()).reshape(entry.shape)
    )
