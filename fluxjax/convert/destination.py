"""Where a conversion may write, and where it refuses to."""

from __future__ import annotations

import os
from pathlib import Path

_MODEL_FILES = ("model_index.json", "*.safetensors", "*.gguf", "params/_METADATA")


def check_destination(source: Path, destination: Path, overwrite: bool) -> None:
    """Raises ValueError or OSError if nothing can or should be written there."""
    there, source = destination.resolve(), source.resolve()
    if there == source or there in source.parents:
        raise ValueError(f"the destination {destination} is or contains the source {source}")
    if source.is_dir() and source in there.parents:
        raise ValueError(f"the destination {destination} lies inside the source {source}")
    if destination.is_symlink() and not destination.exists():
        raise FileExistsError(f"the destination {destination} is a broken link")
    parent = next(p for p in (there.parent, *there.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"nothing can be written to {parent}")
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{destination} exists; give --overwrite to replace it")
    is_model = destination.is_dir() and any(any(destination.glob(name)) for name in _MODEL_FILES)
    if not is_model and destination.suffix not in (".safetensors", ".gguf"):
        raise FileExistsError(f"{destination} is no model, so it is not overwritten; remove it")
