"""What files hold, as a hash; large ones are read once, for weights have many gigabytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fluxjax.atomic_write import write_bytes
from fluxjax.named_errors import naming

_REMEMBERED = 2**26  # smaller files are read sooner than looked up


def hash_file(path: Path) -> str:
    """SHA-256 of a file. One above 64 MiB is remembered by its place, size and time."""
    status = path.stat()
    if status.st_size <= _REMEMBERED:
        return _read(path)
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    memory = base / "fluxjax" / "digests" / hashlib.sha256(os.fsencode(key)).hexdigest()
    with suppress(OSError, UnicodeDecodeError):
        known = memory.read_text()
        if len(known) == 64:
            return known
    digest = _read(path)
    with suppress(OSError):  # a home that cannot be written
        write_bytes(memory, digest.encode())
    return digest


def hash_files(root: Path, names: Iterable[str], *more: str) -> str:
    """Of the names and the content of files and of all that folders hold, below `root`.

    What is absent counts as empty. `more` is hashed too.
    """
    total = hashlib.sha256("\0".join(more).encode())
    for name in names:
        path = root / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in (f for f in files if f.is_file()):
            total.update(os.fsencode(f"{file.relative_to(root).as_posix()} {hash_file(file)}\n"))
    return total.hexdigest()


def _read(path: Path) -> str:
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
