"""How an adapter is given: FILE or FILE:SCALE. Nothing here imports JAX."""

from __future__ import annotations

import math

from fluxjax.config import ConfigError


def split_scale(text: str) -> tuple[str, float]:
    """ "FILE:0.8" -> (FILE, 0.8); without a number, 1."""
    file, _, number = text.rpartition(":")
    try:
        scale = float(number) if file else 1.0
    except ValueError:
        return text, 1.0
    if not math.isfinite(scale):
        raise ConfigError(f"the scale of a LoRA must be a number, got {text!r}")
    return (file, scale) if file else (text, 1.0)
