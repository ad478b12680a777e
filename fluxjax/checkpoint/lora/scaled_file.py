"""How an adapter is given: FILE or FILE:SCALE. Nothing here imports JAX."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fluxjax.config import ConfigError
from fluxjax.hub import find

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, in a folder of an adapter
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_LARGEST = 1e30  # of numbers that are multiplied in float32


def peft_config_of(path: Path) -> Path | None:
    """PEFT's configuration that lies beside an adapter's file and is of no other."""
    beside = path.with_name(ADAPTER_CONFIG)
    lone = path.name == ADAPTER_WEIGHTS or len(list(path.parent.glob("*.safetensors"))) == 1
    return beside if beside.is_file() and lone else None


def split_scale(text: str) -> tuple[str, float]:
    """ "FILE:0.8" -> (FILE, 0.8); without a number, 1."""
    file, _, number = text.rpartition(":")
    try:
        scale = float(number) if file else 1.0
    except ValueError:
        return text, 1.0
    return (file, finite_scale(scale, file)) if file else (text, 1.0)


def finite_scale(scale: Any, of: str) -> float:
    """Raises ConfigError for what is no number, beginning with what it is the scale `of`."""
    try:
        found = float(scale)
    except (TypeError, ValueError):
        found = math.nan
    if not abs(found) < _LARGEST:
        raise ConfigError(f"{of}: its scale must be a number within {_LARGEST:g}, got {scale!r}")
    return found


def scaled_files(given: Any) -> list[tuple[str, float]]:
    """(file, scale) of each of what Python gives: "FILE", "FILE:SCALE", (FILE, SCALE), or several
    of these; none of None. Raises ConfigError for anything else."""
    one = isinstance(given, str | Path) or (
        isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], int | float)
    )
    each: Any = [given] if one else given or ()
    if not isinstance(each, list | tuple) or any(len(x) != 2 for x in each if type(x) is tuple):
        raise ConfigError(f"give FILE, FILE:SCALE, (FILE, SCALE) or a list of these, got {given!r}")
    pairs = (x if isinstance(x, tuple) else split_scale(str(x)) for x in each)
    return [(str(file), finite_scale(scale, str(file))) for file, scale in pairs]


def found(texts: Iterable[str]) -> list[tuple[Path, float]]:
    """Their files on this machine, and their scales. Raises FileNotFoundError for one that is not
    there, ConfigError, and what `find` raises."""
    files = [(find(file, "lora"), scale) for file, scale in map(split_scale, texts)]
    for path, _ in files:
        if not path.exists():
            raise FileNotFoundError(f"there is no LoRA file {path}")
    return files
