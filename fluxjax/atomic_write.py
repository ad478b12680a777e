"""A file or folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_or_nothing(destination: Path) -> Iterator[Path]:
    """A path beside the destination to write to; it takes the destination's place at the end.

    On any error, Ctrl-C included, it is removed and what was there before stays.
    """
    destination = Path(os.path.abspath(destination))
    destination.parent.mkdir(parents=True, exist_ok=True)
    part = destination.with_name(f".{destination.name}.{os.getpid()}.part")
    old = destination.with_name(f".{destination.name}.{os.getpid()}.old")
    try:
        yield part
        if destination.exists():
            os.replace(destination, old)
        try:
            os.replace(part, destination)
        except OSError:
            if old.exists():
                os.replace(old, destination)
            raise
    finally:
        _remove(part)
        if destination.exists():
            _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
