"""Picture files of strangers: decoded safely to RGB, or refused with one reason."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".heif",
    ".jxl",
)
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
# Brands of MP4 and QuickTime (ISO/IEC 14496-12); the other start is Matroska's and WebM's.
_VIDEOS = (b"isom", b"iso2", b"iso4", b"iso5", b"iso6", b"mp41", b"mp42", b"avc1", b"M4V ", b"qt  ")


class BadPicture(ValueError):
    """Why a picture is left out, in words that follow its name."""


@contextmanager
def quiet() -> Iterator[None]:
    """Pillow's warnings about odd files are ours to judge. Not to be entered by several threads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def decode(
    data: bytes, max_megapixels: float, convert: Callable[[Picture], Picture] | None = None
) -> Picture:
    """The picture as it is meant to be seen: upright, sRGB, transparency over white; or what
    `convert` makes of it.

    Formats are an allow-list and the size is checked before any pixel is decoded. Raises
    BadPicture.
    """
    from PIL import Image

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
        return converted(picture, lambda one: (convert or upright_rgb)(_still(one)))


def converted(picture: Picture, convert: Callable[[Picture], Picture]) -> Picture:
    """What `convert` makes of it. Raises BadPicture for whatever decoders raise on its bytes, which
    Pillow reads now."""
    try:
        return convert(picture)
    except (BadPicture, MemoryError):
        raise
    except Exception as error:
        raise BadPicture(f"it cannot be decoded ({error})") from None


def _still(picture: Picture) -> Picture:
    # Phones write previews into JPEGs as further frames (MPO): the first is the picture.
    frames = 1 if picture.format in ("JPEG", "MPO") else getattr(picture, "n_frames", 1)
    if frames > 1:
        raise BadPicture(f"it has {frames} frames, and only still pictures are used")
    return picture


@functools.cache
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _kind(data: bytes) -> str:
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page, not a picture"
    if (data[4:8] == b"ftyp" and data[8:12] in _VIDEOS) or data.startswith(b"\x1aE\xdf\xa3"):
        return "it is a video, not a picture"
    if data[4:8] == b"ftyp" or start.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cjxl")):
        return "HEIC and JPEG XL are not read: convert it to PNG or JPEG"
    return f"it is no picture in a known format ({', '.join(_formats())})"


def upright_rgb(picture: Picture, ground: str = "white") -> Picture:
    """As it is meant to be seen, transparency over `ground`.

    Raises BadPicture for values of no known range.
    """
    import numpy as np
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):  # Pillow's own conversion would clip it
        grey = np.asarray(picture).astype(np.float32) / 257
        return Image.fromarray(np.round(grey).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise BadPicture("it has 32-bit values, whose range is not known")
    if picture.has_transparency_data:
        picture = _managed(picture.convert("RGBA"))
        return Image.alpha_composite(Image.new("RGBA", picture.size, ground), picture).convert(
            "RGB"
        )
    return _managed(picture).convert("RGB")


def upright_holes(picture: Picture) -> Picture:
    """White where it is transparent, black where not. Raises BadPicture if nothing can be."""
    from PIL import ImageOps

    if not picture.has_transparency_data:
        raise BadPicture("it has no transparency")
    return ImageOps.invert(ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A"))


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
