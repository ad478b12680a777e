"""The persistent compilation cache: the second start compiles nothing.

It lies in $XDG_CACHE_HOME/fluxjax/compiled, or ~/.cache/fluxjax/compiled. FLUXJAX_CACHE names
another folder, or `off`; where JAX_COMPILATION_CACHE_DIR is set, JAX's own settings are left alone.

An entry that cannot be read, cut short by a killed process or damaged on the disk, is removed when
JAX comes upon it; the program is compiled and kept anew, in silence.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import stat
import warnings
import zlib
from pathlib import Path
from typing import Any

VARIABLE = "FLUXJAX_CACHE"
# JAX warns, compiles, and would leave the entry where it is.
_READING = re.compile(r"Error reading persistent compilation cache entry for '([^']+)'")
_WRITING = "Error writing persistent compilation cache entry"


def cache_folder() -> Path | None:
    """Where compiled programs are kept, or None where that is switched off."""
    chosen = os.environ.get(VARIABLE, "")
    if chosen.lower() in ("off", "0", "none"):
        return None
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fluxjax" / "compiled"


def enable_cache() -> str | None:
    """Switch the cache on; returns a sentence where it has to stay off.

    The folder is created for its owner alone (0700). One that another user owns or may write is
    not used: it holds executables.
    """
    if chosen := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        _heal(Path(chosen))
        return None
    folder = cache_folder()
    if folder is None:
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if hasattr(os, "getuid") and (
            status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        ):
            return f"compiled programs are not kept: {folder} is open to other users"
        if not os.access(folder, os.W_OK):
            return f"compiled programs are not kept: {folder} is not writable"
    except (OSError, RuntimeError) as error:
        return f"compiled programs are not kept: {folder}: {error}"
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The programs of a small model compile in less than JAX's default threshold of a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _heal(folder)
    return None


def _heal(folder: Path) -> None:
    """From now on JAX's warnings about this cache are answered instead of shown."""
    usual = warnings.showwarning
    if isinstance(usual, _Healer) and usual.folder == folder:
        return
    warnings.filterwarnings("always", "Error (reading|writing) persistent compilation cache")
    warnings.showwarning = _Healer(folder, usual)


class _Healer:
    """`warnings.showwarning`; it is called before JAX compiles what it could not read."""

    def __init__(self, folder: Path, usual: Any) -> None:
        self.folder, self.usual = folder, usual

    def __call__(self, message: Any, *rest: Any, **named: Any) -> None:
        if match := _READING.match(str(message)):
            remove_damaged(self.folder, match[1])
        elif not str(message).startswith(_WRITING):  # a full disk: it is compiled, and not kept
            self.usual(message, *rest, **named)


def remove_damaged(folder: Path, module: str) -> None:
    """Remove the entries of a program that cannot be read; if all can, all of them."""
    entries = list(folder.glob(f"{glob.escape(module)}-*-cache"))
    damaged = [entry for entry in entries if not _is_sound(entry)]
    for entry in damaged or entries:
        with contextlib.suppress(OSError):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _is_sound(entry: Path) -> bool:
    """Does its checksum agree? What is compressed in another way than by zlib has none."""
    try:
        zlib.decompress(entry.read_bytes())
    except (OSError, zlib.error):
        return False
    return True
