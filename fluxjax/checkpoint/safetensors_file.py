"""Reading and writing safetensors files, one tensor at a time, without torch.

The format: 8 bytes little-endian header length, a JSON header, the raw tensors back to back.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from fluxjax.atomic_write import whole_or_nothing
from fluxjax.checkpoint import mapped_memory as memory
from fluxjax.checkpoint.file_format import foreign_format
from fluxjax.checkpoint.tensors import Tensor
from fluxjax.json_input import parse_json
from fluxjax.named_errors import naming

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 32 * 2**20
MAX_TENSORS = 100_000
MAX_AXES = 8
MAX_NAME = 1000


def dtype_name(dtype: np.dtype) -> str:
    """The format's name. Raises ValueError for a dtype that it cannot hold."""
    if dtype not in _NAMES:
        raise ValueError(f"safetensors cannot hold {dtype}")
    return _NAMES[dtype]


def _bad(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is no valid safetensors file: {why}")


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file")
    size = path.stat().st_size
    with naming(path), open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if size < 8 or length > size - 8:
            raise _bad(path, foreign_format(path) or f"it is cut short ({size} bytes)")
        if length > MAX_HEADER_BYTES:
            raise _bad(path, f"its header of {length} bytes exceeds {MAX_HEADER_BYTES}")
        raw = file.read(length)
    try:
        header = parse_json(raw, unique=True)
    except ValueError as error:
        raise _bad(path, foreign_format(path) or f"of its header, {error}") from None
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise _bad(path, f"its header is not an object of at most {MAX_TENSORS} tensors")
    if any(len(name) > MAX_NAME or not name.isprintable() for name in header):
        raise _bad(path, f"a name in it has more than {MAX_NAME} or unprintable characters")
    return header, 8 + length


def _checked_entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _bad(path, f"the entry of {name!r} lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _bad(path, f"{name!r} has the unknown dtype {str(dtype)[:20]!r}")
    if isinstance(shape, list) and len(shape) > MAX_AXES:
        raise _bad(path, f"{name!r} has {len(shape)} axes, more than {MAX_AXES}")
    integers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if any(type(number) is not int or not 0 <= number < 2**62 for number in integers):
        raise _bad(path, f"{name!r} has a shape or offsets that are no natural numbers")
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise _bad(path, f"{name!r} has {end - begin} bytes, which is not {dtype} {shape}")
    return DTYPES[dtype], tuple(shape), begin, end


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Lazy tensors by name, in file order, and the metadata. Checks the whole header.

    Raises ValueError for anything malformed: offsets that overlap, leave gaps or leave the file,
    sizes that contradict shapes, unknown dtypes, doubled names, oversized headers.
    """
    path = Path(path)
    header, start = _read_header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "its metadata is not an object of strings")
    entries = {name: _checked_entry(path, name, entry) for name, entry in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    position = 0
    for name, (_, _, begin, end) in entries.items():
        if begin != position:
            raise _bad(path, f"{name!r} begins at {begin} where {position} is due")
        position = end
    if start + position != path.stat().st_size:
        raise _bad(path, f"its data should end at byte {start + position}, not at its end")
    return {
        name: Tensor(
            shape, dtype, partial(read_rows, path, start + begin, shape, dtype), by_rows=True
        )
        for name, (dtype, shape, begin, _) in entries.items()
    }, metadata


def read_rows(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, start: int, stop: int
) -> np.ndarray:
    """Rows [start, stop) of a tensor that begins at byte `offset` of a file. Raises OSError."""
    row = int(np.prod(shape[1:], dtype=np.int64))
    out = memory.empty((stop - start, *shape[1:]) if shape else (), dtype)
    with naming(path), open(path, "rb", buffering=0) as file:
        file.seek(offset + start * row * dtype.itemsize)
        view = out.reshape(-1).view(np.uint8).data
        while view:
            count = file.readinto(view)
            if not count:
                raise OSError(f"{path} ended while it was read")
            view = view[count:]
    return out


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Write the tensors in the given order, one in memory at a time.

    `progress(name, bytes)` is called after each. The file appears only once it is whole: see
    `atomic_write.whole_or_nothing` for what that raises.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in tensors.items():
        offsets = [position, position := position + tensor.nbytes]
        header[name] = {
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with whole_or_nothing(path) as part, open(part, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, tensor in tensors.items():
            write_tensor(file, name, tensor)
            if progress:
                progress(name, tensor.nbytes)
        file.flush()
        os.fsync(file.fileno())


def write_tensor(file: BinaryIO, name: str, tensor: Tensor) -> None:
    """Appends the bytes, block by block. Raises ValueError for a tensor that reads as another."""
    count = 0
    for block in tensor.blocks():
        if block.dtype != tensor.dtype:
            raise ValueError(f"{name} was read as {block.dtype}, not {tensor.dtype}")
        count += file.write(block.reshape(-1).view(np.uint8).data)
    if count != tensor.nbytes:
        raise ValueError(f"{name} was read as {count} bytes, not {tensor.nbytes}")
