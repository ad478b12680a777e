"""Sizes and pixels of the pictures that a model sees, as diffusers has them.

Source: diffusers `FluxKontextPipeline`, `VaeImageProcessor`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from fluxjax.config import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# Width and height of the pictures that Kontext was trained on, and their area, more or less.
PREFERRED = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
)
AREA = 1024**2


def preferred_size(width: int, height: int, *, area: int, unit: int) -> tuple[int, int]:
    """The (width, height) of PREFERRED that is nearest in aspect.

    For a model whose pictures have another `area` it is scaled, in multiples of `unit` pixels.
    Raises ConfigError for a picture smaller than `unit`.
    """
    if min(width, height) < unit:
        raise ConfigError(
            f"a reference has at least {unit} pixels on each side, got {width} x {height}"
        )
    aspect = (width // unit * unit) / (height // unit * unit)
    _, *sides = min((abs(aspect - w / h), w, h) for w, h in PREFERRED)
    scale = math.sqrt(area / AREA) / unit
    width, height = (max(1, round(side * scale)) * unit for side in sides)
    return width, height


def whole_size(width: int, height: int, *, unit: int) -> tuple[int, int]:
    """The (width, height) of what is drawn from a picture: its own, rounded down.

    Raises ConfigError for a picture smaller than `unit`.
    """
    if min(width, height) < unit:
        raise ConfigError(
            f"a picture has at least {unit} pixels on each side, got {width} x {height}"
        )
    return width // unit * unit, height // unit * unit


def pixels(picture: Picture, width: int, height: int) -> Float[np.ndarray, "1 height width 3"]:
    """Stretched to the size; values in [-1, 1]."""
    from PIL import Image

    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    return 2 * (np.asarray(resized, np.float32)[None] / 255) - 1
