"""Where this user's files lay when pictures were drawn with them, by their hashes.

Pictures name a file outside of their own surroundings by name and hash alone, so that they tell
nobody about a disk. For the one who drew them this memory, in the cache folder, knows the place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fluxjax.atomic_write import write_bytes


def _memory(hashes: Mapping[str, str]) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    key = hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()
    return base / "fluxjax" / "places" / key


def remember(path: str, hashes: Mapping[str, str]) -> None:
    """A home that cannot be written remembers nothing."""
    with suppress(OSError, RuntimeError):
        memory, content = _memory(hashes), os.fsencode(path)
        if not memory.is_file() or memory.read_bytes() != content:
            write_bytes(memory, content)


def recall(hashes: Mapping[str, str]) -> Path | None:
    """The place of what has these hashes, if it was here and something is still there."""
    with suppress(OSError, RuntimeError, ValueError):
        path = Path(os.fsdecode(_memory(hashes).read_bytes()))
        if path.is_absolute() and path.exists():
            return path
    return None
