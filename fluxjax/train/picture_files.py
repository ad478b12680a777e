"""Picture files of strangers: decoded safely to RGB, or refused with one reason; fitted to size."""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif",
    ".heic", ".heif", ".jxl",
)  # fmt: skip
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")


class BadPicture(ValueError):
    """Why a picture is left out, in words that follow its name."""


@contextmanager
def quiet() -> Iterator[None]:
    """Pillow's warnings about odd files are ours to judge. Not to be entered by several threads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def decode(data: bytes, max_megapixels: float) -> Picture:
    """The picture as it is meant to be seen: upright, sRGB, transparency over white.

    Formats are an allow-list and the size is checked before any pixel is decoded. Raises
    BadPicture.
    """
    from PIL import Image, ImageOps

    if not data:
        raise BadPicture("the file is empty")
    try:
        picture: Any = Image.open(io.BytesIO(data), formats=_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadPicture(f"it has more than {max_megapixels:g} megapixels") from None
    except Image.UnidentifiedImageError:
        raise BadPicture(_kind(data)) from None
    except Exception as error:  # decoders raise almost anything on hostile bytes
        raise BadPicture(f"it cannot be read ({error})") from None
    with picture:
        megapixels = picture.width * picture.height / 1e6
        if megapixels > max_megapixels:
            raise BadPicture(f"it has {megapixels:.0f} megapixels, more than {max_megapixels:g}")
        try:
            # Phones write previews into JPEGs as further frames (MPO): the first is the picture.
            frames = 1 if picture.format in ("JPEG", "MPO") else getattr(picture, "n_frames", 1)
            if frames > 1:
                raise BadPicture(f"it has {frames} frames, and only still pictures are used")
            return _to_rgb(ImageOps.exif_transpose(picture))
        except (BadPicture, MemoryError):
            raise
        except Exception as error:
            raise BadPicture(f"it cannot be decoded ({error})") from None


@functools.cache
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _kind(data: bytes) -> str:
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page, not a picture"
    if data[4:8] == b"ftyp" or start.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cjxl")):
        return "HEIC and JPEG XL are not read: convert it to PNG or JPEG"
    return f"it is no picture in a known format ({', '.join(_formats())})"


def _to_rgb(picture: Picture) -> Picture:
    from PIL import Image

    if picture.mode.startswith("I;16"):  # Pillow's own conversion would clip it
        grey = np.asarray(picture).astype(np.float32) / 257
        return Image.fromarray(np.round(grey).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise BadPicture("it has 32-bit values, whose range is not known")
    if picture.has_transparency_data:
        picture = _managed(picture.convert("RGBA"))
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
            "RGB"
        )
    return _managed(picture).convert("RGB")


def _managed(picture: Picture) -> Picture:
    """With its colour profile applied (Display P3 of phones, print profiles of CMYK files)."""
    from PIL import ImageCms

    profile = picture.info.get("icc_profile")
    if not profile or picture.mode not in ("L", "RGB", "RGBA", "CMYK"):
        return picture
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(source).lower()
        if name.startswith("srgb") and "linear" not in name:
            return picture
        mode = "RGBA" if picture.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(
            picture, source, ImageCms.createProfile("sRGB"), outputMode=mode
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return picture  # a damaged or foreign profile: as viewers do, colours are taken as sRGB
    return converted or picture


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
    sides = range(step, int(resolution * math.sqrt(max_aspect)) + 1, step)
    sizes = [
        (w, h)
        for w in sides
        for h in sides
        if w * h <= resolution**2
        and w <= width
        and h <= height
        and max(w, h) <= max_aspect * min(w, h)
    ]

    def kept(size: tuple[int, int]) -> tuple[float, int]:
        ratio = (size[0] * height) / (size[1] * width)
        return size[0] * size[1] * min(ratio, 1 / ratio), size[0]

    return max(sizes, key=kept)


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
