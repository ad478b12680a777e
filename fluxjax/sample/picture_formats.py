"""Pictures as PNG, JPEG and WebP files that remember how they were made.

Our record is JSON: the text chunk `fluxjax` of a PNG, the maker's note of an Exif block elsewhere.
What other programs read of generated pictures stands beside it, in the places that AUTOMATIC1111's
web UI made usual: the text chunk `parameters`, and Exif's user comment.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxjax.config import ConfigError
from fluxjax.picture_files import quiet
from fluxjax.sample.file_names import FORMATS

if TYPE_CHECKING:
    from PIL.Image import Image

RECORD, PARAMETERS = "fluxjax", "parameters"
# Exif 2.32: the tags of its own directory, of the maker's note and of the user comment.
_EXIF, _MAKER_NOTE, _USER_COMMENT = 0x8769, 0x927C, 0x9286
_MAKER, _UTF16 = b"fluxjax\0", b"UNICODE\0"
_EXIF_BYTES = 65_000  # a JPEG's segments have 16-bit lengths
_COMMENT = 8000  # characters
_RECORD_CHARACTERS = 2**22
# How lossy formats are written: nothing that an eye sees is lost.
_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
}


def encode_picture(
    picture: Image, suffix: str, record: Mapping[str, Any] | None = None, parameters: str = ""
) -> bytes:
    """The file's bytes, in the format that `suffix` names; without a record it says nothing.

    Raises ConfigError for another suffix, and for a record that does not fit into a JPEG or WebP.
    """
    kind = FORMATS.get(suffix.lower())
    if kind is None:
        raise ConfigError(f"pictures are written as {', '.join(FORMATS)}, not as {suffix!r}")
    options = dict(_OPTIONS[kind])
    if record is not None:
        text = json.dumps(record, ensure_ascii=False)
        options |= _png_texts(text, parameters) if kind == "PNG" else exif_of(text, parameters)
    buffer = io.BytesIO()
    # Not `picture` itself: what it carries from elsewhere is not ours to write.
    plain = picture.convert("RGB").copy()
    plain.info = {}
    plain.save(buffer, kind, **options)
    return buffer.getvalue()


def _png_texts(record: str, parameters: str) -> dict[str, Any]:
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_itxt(RECORD, record)
    if parameters:
        texts.add_text(PARAMETERS, parameters)
    return {"pnginfo": texts}


def exif_of(record: str, parameters: str = "") -> dict[str, Any]:
    """Pillow's option that writes it. Raises ConfigError for a record that does not fit."""
    from PIL.Image import Exif

    exif = Exif()
    tags = exif.get_ifd(_EXIF)
    tags[_MAKER_NOTE] = _MAKER + record.encode()
    if parameters:
        tags[_USER_COMMENT] = _UTF16 + parameters[:_COMMENT].encode("utf-16-be")
    data = exif.tobytes()
    if len(data) > _EXIF_BYTES:
        raise ConfigError("what the picture was made with is longer than such a file holds")
    return {"exif": data}


def read_record(path: Path) -> dict[str, Any]:
    """What `encode_picture` wrote beside the pixels, which are not decoded.

    Raises FileNotFoundError, or ConfigError for a picture that was not made here.
    """
    from PIL import Image

    if not path.is_file():
        raise FileNotFoundError(f"there is no picture {path}")
    try:
        with quiet(), Image.open(path, formats=tuple(_OPTIONS)) as picture:
            text = picture.info.get(RECORD)
            if not isinstance(text, str):
                note: Any = picture.getexif().get_ifd(_EXIF).get(_MAKER_NOTE, b"")
                text = note.removeprefix(_MAKER).decode() if note.startswith(_MAKER) else ""
    except Exception as error:  # decoders raise almost anything on hostile bytes
        raise ConfigError(f"{path} is not a picture that can be read ({error})") from None
    if not text:
        raise ConfigError(
            f"{path} does not say how it was made: fluxjax did not write it, or not its record; "
            "in Python fluxjax.save_picture writes it"
        )
    try:
        record = json.loads(text) if len(text) <= _RECORD_CHARACTERS else None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ConfigError(f"{path}: what it says about how it was made is damaged")
    return record
