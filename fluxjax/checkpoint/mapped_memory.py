"""Arrays whose memory returns to the system as soon as they are gone.

An allocator keeps what is freed for the next request: reading a checkpoint of many gigabytes
through buffers of a few megabytes would leave hundreds of them behind.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

import numpy as np

_OWN_MAPPING = 2**20  # bytes from which on an array has a mapping of its own
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANON} if hasattr(mmap, "MAP_ANON") else {}


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """As np.empty."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size < _OWN_MAPPING:
        return np.empty(shape, dtype)
    mapping = mmap.mmap(-1, size, **_PRIVATE)
    return np.frombuffer(mapping, np.uint8).view(dtype).reshape(shape)


def contiguous(array: np.ndarray) -> np.ndarray:
    """As np.ascontiguousarray, which also does not copy what is contiguous."""
    if array.flags.c_contiguous:
        return array
    out = empty(array.shape, array.dtype)
    np.copyto(out, array)
    return out


def release() -> None:
    """Gives back to the system what the allocator keeps, as after compiling; with glibc."""
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Any:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
