"""Writing GGUF files: codes as they are, what is not quantised as F32, F16 or BF16."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from fluxjax.atomic_write import whole_or_nothing
from fluxjax.checkpoint.quantised.gguf import ALIGNMENT, MAGIC, PLAIN
from fluxjax.checkpoint.safetensors_file import write_tensor
from fluxjax.checkpoint.tensors import Tensor, astype
from fluxjax.models.gguf_blocks import BLOCK_TYPES

_TYPES = {dtype: number for number, dtype in PLAIN.items() if number in (0, 1, 30)}
_UINT32, _STRING = 4, 8


def stored(tensor: Tensor) -> tuple[Tensor, int]:
    """What of a tensor is written, and the number of its type. Vectors are F32, as is usual."""
    if tensor.packed is not None and tensor.packed.kind in BLOCK_TYPES:
        return tensor.packed.parts["blocks"], BLOCK_TYPES[tensor.packed.kind].number
    if len(tensor.shape) < 2 or tensor.dtype not in _TYPES:
        tensor = astype(tensor, np.dtype(np.float32))
    return tensor, _TYPES[tensor.dtype]


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    keys: Mapping[str, str | int],
    *,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """One tensor in memory at a time; `progress(name, bytes)` after each.

    The file appears only once it is whole: see `atomic_write.whole_or_nothing` for what that
    raises.
    """
    parts = {name: stored(tensor) for name, tensor in tensors.items()}
    header = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(keys))]
    for key, value in keys.items():
        kind = _STRING if isinstance(value, str) else _UINT32
        data = _text(value) if isinstance(value, str) else struct.pack("<I", value)
        header += [_text(key), struct.pack("<I", kind), data]
    offset = 0
    for name, (part, number) in parts.items():
        shape = tensors[name].shape
        header += [_text(name), struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))]
        header += [struct.pack("<IQ", number, offset)]
        offset += part.nbytes + -part.nbytes % ALIGNMENT
    raw = b"".join(header)
    with whole_or_nothing(Path(path)) as whole, open(whole, "wb") as file:
        file.write(raw + bytes(-len(raw) % ALIGNMENT))
        for name, (part, _) in parts.items():
            write_tensor(file, name, part)
            file.write(bytes(-part.nbytes % ALIGNMENT))
            if progress:
                progress(name, part.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data
