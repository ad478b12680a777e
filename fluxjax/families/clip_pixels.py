"""A picture as CLIP's vision encoder takes it. Source: transformers `CLIPImageProcessor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# CLIP's, of red, green and blue.
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def clip_pixels(picture: Picture, size: int) -> Float[np.ndarray, "size size 3"]:
    """The middle square of a picture whose shorter side is `size`, with CLIP's mean and spread."""
    from PIL import Image

    short = min(picture.size)
    width, height = (int(size * side / short) for side in picture.size)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    square = resized[top : top + size, left : left + size].astype(np.float32)
    return (square * np.float32(1 / 255) - _MEAN) / _DEVIATION
