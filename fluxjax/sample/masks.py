"""Masks: which pixels are painted anew, and the crop of a picture around them.

White is painted anew. Source: diffusers `VaeImageProcessor`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from einops import reduce
from jaxtyping import Float

from fluxjax.config import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Box = tuple[int, int, int, int]  # left, top, right, bottom
OVERLAP = 0.01  # of a side: how far the mask of a border reaches into the picture, as BFL has it


def mask_values(
    mask: Picture, width: int, height: int, *, soft: bool = False
) -> Float[np.ndarray, "1 height width"]:
    """Stretched to the size: 1 is painted anew, 0 is not; between them only if `soft`.

    In colour until it has its size, as diffusers does.
    """
    from PIL import Image

    grey = mask.resize((width, height), Image.Resampling.LANCZOS).convert("L")
    values = np.asarray(grey, np.float32)[None] / 255
    return values if soft else (values >= 0.5).astype(np.float32)


def painted_latents(
    mask: Float[np.ndarray, "n height width"], scale: int
) -> Float[np.ndarray, "n 1 rows columns"]:
    """Of each latent the whitest of its scale x scale pixels: one with any to paint is painted."""
    return reduce(mask, "n (h y) (w x) -> n 1 h w", "max", y=scale, x=scale)


def expanded(
    image: Picture,
    mask: Picture | None,
    sides: tuple[int, int, int, int],
    *,
    stretched: bool = False,
) -> tuple[Picture, Picture]:
    """With a border of (left, top, right, bottom) pixels, black or the `stretched` edge, and the
    mask that has it painted.

    The border's mask reaches a little into the picture, so that the seam is painted too.
    """
    from PIL import Image

    left, top, right, bottom = sides
    size = image.width + left + right, image.height + top + bottom
    around = ((top, bottom), (left, right), (0, 0))
    mode = "edge" if stretched else "constant"
    larger = Image.fromarray(np.pad(np.asarray(image), around, mode))
    inside = Image.new("RGB", image.size, "black") if mask is None else mask.convert("RGB")
    x, y = int(image.width * OVERLAP), int(image.height * OVERLAP)
    kept = inside.crop(
        (
            x * (left > 0),
            y * (top > 0),
            image.width - x * (right > 0),
            image.height - y * (bottom > 0),
        )
    )
    holes = Image.new("RGB", size, "white")
    holes.paste(kept, (left + x * (left > 0), top + y * (top > 0)))
    return larger, holes


def crop_box(mask: Picture, width: int, height: int, margin: int) -> Box:
    """Around all that is not black, with a margin, grown towards the aspect of width x height.

    As `VaeImageProcessor.get_crop_region`. Raises ConfigError for a mask that is all black.
    """
    found = mask.convert("L").getbbox()
    if found is None:
        raise ConfigError("mask_crop crops around what is white, and the mask is all black")
    left, top = max(found[0] - margin, 0), max(found[1] - margin, 0)
    right, bottom = min(found[2] + margin, mask.width), min(found[3] + margin, mask.height)
    aspect = width / height
    if (right - left) / (bottom - top) > aspect:
        missing = int((right - left) / aspect - (bottom - top))
        top, bottom = _grown(top, bottom, missing, mask.height)
    else:
        missing = int((bottom - top) * aspect - (right - left))
        left, right = _grown(left, right, missing, mask.width)
    return left, top, right, bottom


def _grown(first: int, last: int, by: int, length: int) -> tuple[int, int]:
    """`first` ... `last` longer by so much, on both sides, moved into 0 ... length."""
    first, last = first - by // 2, last + by - by // 2
    if last >= length:
        first, last = first - (last - length), length
    if first < 0:
        first, last = 0, last - first
    return first, min(last, length)


def cropped(picture: Picture, box: Box, width: int, height: int) -> Picture:
    """What is in the box, as large as fits; the rest is its stretched edge.

    Raises ConfigError for a box that is less than a pixel high or wide then."""
    from PIL import Image

    part = picture.crop(box)
    wide, high = width, height
    if width / height < part.width / part.height:
        high = part.height * width // part.width
    else:
        wide = part.width * height // part.height
    if min(wide, high) < 1:
        raise ConfigError(
            f"mask_crop cuts out {part.width} x {part.height} pixels, less than a line of a "
            f"picture of {width} x {height}: draw it in a size more like that"
        )
    part = part.resize((wide, high), Image.Resampling.LANCZOS)
    whole = Image.new("RGB", (width, height))
    left, top = width // 2 - wide // 2, height // 2 - high // 2
    whole.paste(part, (left, top))
    if top > 0:
        edge = part.resize((width, top), box=(0, 0, width, 0))
        whole.paste(edge, (0, 0))
        edge = part.resize((width, top), box=(0, high, width, high))
        whole.paste(edge, (0, top + high))
    if left > 0:
        edge = part.resize((left, height), box=(0, 0, 0, height))
        whole.paste(edge, (0, 0))
        edge = part.resize((left, height), box=(wide, 0, wide, height))
        whole.paste(edge, (left + wide, 0))
    return whole


def pasted(drawn: Picture, image: Picture, mask: Picture, box: Box) -> Picture:
    """The image with the drawn picture in the box, where its mask is white: elsewhere, to the
    pixel, as it was."""
    from PIL import Image, ImageOps

    width, height = box[2] - box[0], box[3] - box[1]
    wide, high = width, height
    if width / height > drawn.width / drawn.height:
        high = drawn.height * width // drawn.width
    else:
        wide = drawn.width * height // drawn.height
    part = Image.new("RGB", (width, height))
    resized = drawn.resize((wide, high), Image.Resampling.LANCZOS)
    part.paste(resized, (width // 2 - wide // 2, height // 2 - high // 2))
    below = Image.new("RGB", image.size)
    below.paste(part, box[:2])
    above = Image.new("RGBa", image.size)
    kept = ImageOps.invert(mask.convert("L"))
    above.paste(image.convert("RGBA").convert("RGBa"), mask=kept)
    return Image.alpha_composite(below.convert("RGBA"), above.convert("RGBA")).convert("RGB")
