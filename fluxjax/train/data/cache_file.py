"""Small files that several processes and threads may write at once, found by a hash."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import numpy as np

from fluxjax.atomic_write import write_bytes
from fluxjax.cli import sentence

_CHECK, _KEY = "crc32", "key"


def data_folder() -> Path:
    """Where latents, text states and hashes are kept unless the settings name a folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fluxjax" / "data"


def usable_folder(other: Path) -> tuple[Path, str]:
    """`data_folder`, or `other` where that cannot be written; and what there is to say of it."""
    try:
        folder = data_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder, ""
        reason = f"{folder} cannot be written"
    except (OSError, RuntimeError) as error:  # read-only, full; no home at all
        reason = sentence(error)
    return other, f"latents and text states are kept in {other}: {reason}"


def write_arrays(path: Path, arrays: dict[str, np.ndarray], key: str) -> None:
    """As safetensors with a checksum of arrays and key. Float32 becomes float16 where it fits."""
    from safetensors.numpy import save

    arrays = {name: compact(value) for name, value in arrays.items()}
    check = np.array([_checksum(arrays, key)], np.uint32)
    write_bytes(path, save({**arrays, _CHECK: check}, {_KEY: key}))


def read_arrays(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """What `write_arrays` wrote, as float32; None if there is no such file.

    Raises ValueError for a file that is damaged or is that of another key, OSError for one that
    cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        arrays = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        found = header["__metadata__"][_KEY]
        check = int(arrays.pop(_CHECK)[0])
    except (SafetensorError, KeyError, ValueError, IndexError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if check != _checksum(arrays, found):
        raise ValueError(f"{path} is damaged")
    if found != key:
        raise ValueError(f"{path} holds what belongs elsewhere")
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def compact(value: np.ndarray) -> np.ndarray:
    """Latents and text states are of order one, where float16 is finer than bfloat16."""
    if np.abs(value).max(initial=0) < np.finfo(np.float16).max:
        return np.ascontiguousarray(value, np.float16)
    return np.ascontiguousarray(value, np.float32)


def _checksum(arrays: dict[str, np.ndarray], key: str) -> int:
    check = zlib.crc32(key.encode())
    for name in sorted(arrays):
        check = zlib.crc32(np.ascontiguousarray(arrays[name]).data.cast("B"), check)
        check = zlib.crc32(f"{name}{arrays[name].shape}".encode(), check)
    return check
