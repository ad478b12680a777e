"""Names of pictures: a pattern with fields, filled with what decided about the picture."""

from __future__ import annotations

import datetime
import re
import string
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxjax.config import ConfigError
from fluxjax.sample.settings import Settings

PATTERN = "{prompt}-{seed}"
FIELDS = ("prompt", "seed", "number", "model", "width", "height", "steps", "date")
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
CLIP_FORMATS = (".mp4", ".webp")
_INTEGERS = ("seed", "number", "width", "height", "steps")
_CHARACTERS, _FIELD_BYTES, _NAME_BYTES = 60, 120, 200  # file systems take 255 bytes in all
_FORBIDDEN = '/\\:*?"<>|'


def is_picture_name(path: Path) -> bool:
    """Whether the name ends as a kind of picture or clip that is written here."""
    return path.suffix.lower() in (*FORMATS, *CLIP_FORMATS)


def check_pattern(pattern: str) -> None:
    """Raises ConfigError for a pattern that makes no name, or one outside its folder."""

    def wrong(why: str) -> ConfigError:
        return ConfigError(f"--name {pattern!r}: {why}")

    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise wrong(f"{error}; fields are written {{prompt}}, a brace {{{{") from None
    for text, field, form, conversion in parts:
        bad = next((c for c in text if c in _FORBIDDEN or not c.isprintable()), None)
        if bad is not None:
            raise wrong(f"{bad!r} cannot be in a file's name; folders belong into --out")
        if field is None:
            continue
        if field not in FIELDS:
            raise wrong(f"there is no field {field!r}, but {', '.join(FIELDS)}")
        if conversion or (form and (field not in _INTEGERS or not re.fullmatch(r"0\d\d?", form))):
            raise wrong(f"after {field} only a number of digits may stand, such as {{seed:05}}")
    if not pattern.strip() or pattern.startswith("."):
        raise wrong("a name is not empty and does not begin with a dot")


def file_name(
    settings: Settings,
    pattern: str = PATTERN,
    *,
    number: int = 1,
    model: str = "",
    usual: str = ".png",
) -> str:
    """A name that any file system takes. `number` counts the pictures of a run; `usual` is the
    suffix where the pattern has none."""
    values: Mapping[str, Any] = {
        "prompt": readable(settings.prompt) or "picture",
        "model": readable(model) or "model",
        "number": number,
        "date": datetime.date.today().isoformat(),
        **{name: getattr(settings, name) for name in ("seed", "width", "height", "steps")},
    }
    name = pattern.format_map(values)
    suffix = Path(name).suffix if is_picture_name(Path(name)) else ""
    stem = name.removesuffix(suffix)
    if len(stem.encode()) > _NAME_BYTES:
        # Its end tells pictures of one prompt apart.
        end = stem[-24:]
        stem = _cut(stem[:-24], _NAME_BYTES - len(end.encode())) + end
    return f"{stem}{suffix or usual}"


def readable(text: str) -> str:
    """Letters and digits of any script, joined by hyphens, at most 60 of them and 120 bytes."""
    text = unicodedata.normalize("NFC", text[:1000]).lower()
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return _cut("-".join("".join(kept).split())[:_CHARACTERS], _FIELD_BYTES).strip("-")


def _cut(text: str, size: int) -> str:
    return text.encode()[:size].decode(errors="ignore")
