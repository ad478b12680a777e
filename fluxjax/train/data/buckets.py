"""The sizes that pictures of any size are trained at, and how they are cut to them."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from fluxjax.picture_files import BadPicture

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


@functools.lru_cache(maxsize=65536)
def bucket(
    width: int, height: int, *, resolution: int, step: int, max_aspect: float
) -> tuple[int, int]:
    """(width, height) in multiples of `step` that a picture is scaled down and cropped to.

    Of all sizes of at most resolution² pixels, none larger than the picture, it is the one that
    keeps most: its area times the share of the picture that cropping leaves. Raises BadPicture.
    """
    if min(width, height) < step:
        raise BadPicture(f"it has {width} x {height} pixels, and each side needs {step}")
    longest = int(resolution * math.sqrt(max_aspect))
    sizes = [
        (w, h)
        for w in range(step, min(longest, width) + 1, step)
        for h in range(step, min(longest, height) + 1, step)
        if w * h <= resolution**2 and max(w, h) <= max_aspect * min(w, h)
    ]

    def kept(size: tuple[int, int]) -> tuple[float, int]:
        ratio = (size[0] * height) / (size[1] * width)
        return size[0] * size[1] * min(ratio, 1 / ratio), size[0]

    return max(sizes, key=kept)


def cut(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(left, top) of what `fit` cuts out, in pixels of the scaled picture."""
    scale = max(size[0] / original[0], size[1] / original[1])
    left, top = (round((o * scale - s) / 2) for o, s in zip(original, size, strict=True))
    return left, top


def fit(picture: Picture, width: int, height: int) -> Float[np.ndarray, "height width 3"]:
    """Scaled so that it just covers the size, its middle cut out; values in [-1, 1]."""
    from PIL import Image

    scale = max(width / picture.width, height / picture.height)
    left = (picture.width - width / scale) / 2
    top = (picture.height - height / scale) / 2
    box = (left, top, picture.width - left, picture.height - top)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(picture, np.float32) / np.float32(127.5) - 1
