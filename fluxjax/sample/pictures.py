"""Pictures as bytes and as PNG files that remember how they were made."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from fluxjax.atomic_write import write_new
from fluxjax.config import ConfigError
from fluxjax.sample.settings import Rounding

RECORD = "fluxjax"  # the keyword of the PNG text chunk


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


def file_name(prompt: str, seed: int) -> str:
    """A name that any file system takes: words of the prompt and the seed."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-")
    return f"{words or 'picture'}-{seed}.png"


def save(picture: UInt8[np.ndarray, "height width c"], path: Path, record: Mapping) -> Path:
    """Write a PNG with `record` inside; returns its path.

    A file that is already there is kept and the new one gets a number: `name-2.png`. The file
    appears whole or not at all. Raises OSError when it cannot be written.
    """
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_itxt(RECORD, json.dumps(record, ensure_ascii=False))
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="PNG", pnginfo=text)
    return write_new(path, content.getvalue())


def read_record(path: Path) -> dict[str, Any]:
    """What `save` wrote beside the pixels.

    Raises FileNotFoundError, or ConfigError for a picture that was not made here.
    """
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise FileNotFoundError(f"there is no picture {path}")
    try:
        with Image.open(path) as picture:
            text = picture.info.get(RECORD)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"{path} is not a picture that can be read ({error})") from None
    try:
        record = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise ConfigError(f"{path} does not say how it was made: it was not written by fluxjax")
    return record
