"""The persistent compilation cache: the second start compiles nothing.

It lies in $XDG_CACHE_HOME/fluxjax/compiled, or ~/.cache/fluxjax/compiled. FLUXJAX_CACHE names
another folder, or `off`; where JAX_COMPILATION_CACHE_DIR is set, JAX's own settings are left alone.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

VARIABLE = "FLUXJAX_CACHE"


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
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
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
    return None
