"""Pictures as bytes, with the rounding of the implementation that is followed."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

from fluxjax.sample.settings import Rounding


def to_bytes(
    pictures: Float[np.ndarray, "n *frames height width c"], rounding: Rounding = "diffusers"
) -> UInt8[np.ndarray, "n *frames height width c"]:
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


def in_size(
    pictures: Float[np.ndarray, "n rows columns c"], width: int, height: int
) -> Float[np.ndarray, "n height width c"]:
    """As large as needed to cover `width` x `height`, by two neighbours along each side, and the
    middle of that. Source: diffusers `PixArtImageProcessor.resize_and_crop_tensor`."""
    rows, columns = pictures.shape[1:3]
    if (rows, columns) == (height, width):
        return pictures
    ratio = max(height / rows, width / columns)
    high, wide = int(rows * ratio), int(columns * ratio)
    pictures = _interpolated(_interpolated(np.asarray(pictures), high, axis=1), wide, axis=2)
    top, left = (high - height) // 2, (wide - width) // 2
    return pictures[:, top : top + height, left : left + width]


def _interpolated(x: np.ndarray, count: int, *, axis: int) -> np.ndarray:
    places = np.maximum((np.arange(count) + 0.5) * (x.shape[axis] / count) - 0.5, 0)
    first = places.astype(np.int64)
    shape = [count if i == axis else 1 for i in range(x.ndim)]
    share = (places - first).astype(np.float32).reshape(shape)
    after = np.take(x, np.minimum(first + 1, x.shape[axis] - 1), axis).astype(np.float32)
    return ((1 - share) * np.take(x, first, axis) + share * after).astype(x.dtype)
