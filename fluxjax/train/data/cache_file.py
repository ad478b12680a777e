"""Small files that several processes and threads may write at once, found by a hash."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np

from fluxjax.atomic_write import write_bytes

_CHECK = "crc32"


def data_folder() -> Path:
    """Where latents, text states and hashes are kept unless the settings name a folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fluxjax" / "data"


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """As safetensors with a checksum. Float32 becomes float16 where that can hold it."""
    from safetensors.numpy import save

    arrays = {name: compact(value) for name, value in arrays.items()}
    check = np.array([_checksum(arrays)], np.uint32)
    write_bytes(path, save({**arrays, _CHECK: check}))


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """What `write_arrays` wrote, as float32; None if it is absent or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(path.read_bytes())
        check = int(arrays.pop(_CHECK)[0])
    except (FileNotFoundError, SafetensorError, KeyError, ValueError, IndexError):
        return None
    if check != _checksum(arrays):
        return None
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def compact(value: np.ndarray) -> np.ndarray:
    """Latents and text states are of order one, where float16 is finer than bfloat16."""
    if np.abs(value).max(initial=0) < np.finfo(np.float16).max:
        return np.ascontiguousarray(value, np.float16)
    return np.ascontiguousarray(value, np.float32)


def _checksum(arrays: dict[str, np.ndarray]) -> int:
    check = 0
    for name in sorted(arrays):
        check = zlib.crc32(np.ascontiguousarray(arrays[name]).data.cast("B"), check)
        check = zlib.crc32(f"{name}{arrays[name].shape}".encode(), check)
    return check
