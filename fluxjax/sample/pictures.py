"""Pictures as bytes, with the rounding of the implementation that is followed."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

from fluxjax.sample.settings import Rounding


def to_bytes(
    pictures: Float[np.ndarray, "n height width c"], rounding: Rounding = "diffusers"
) -> UInt8[np.ndarray, "n height width c"]:
    """From [-1, 1] to 0 ... 255: diffusers rounds, BFL truncates, each in the picture's dtype."""
    if rounding == "bfl":
        one = pictures.dtype.type(1.0)
        scaled = pictures.dtype.type(127.5) * (np.clip(pictures, -one, one) + one)
        return scaled.astype(np.float32).astype(np.uint8)
    if rounding == "none":
        pictures = pictures.astype(np.float32)
    half = pictures.dtype.type(0.5)
    unit = (pictures * half + half).astype(np.float32)
    return np.round(np.clip(unit, 0.0, 1.0) * np.float32(255.0)).astype(np.uint8)
