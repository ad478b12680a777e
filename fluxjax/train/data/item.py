"""One picture of a source, and the checks that all kinds of sources share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fluxjax.picture_files import BadPicture
from fluxjax.train.data.settings import DataSettings

MAX_BYTES = 2**30  # of a picture's file
MAX_CAPTION_BYTES = 2**20


class Item(NamedTuple):
    """One picture or clip. `problem` is empty, or why it cannot be used, seen without decoding it.

    `stamp` changes when the picture may have. `read` gives the file's bytes, or pixels (h, w, 3)
    of a drawn picture; it raises BadPicture or OSError. `digest` stands for content known ahead.
    `beside` finds pictures that lie in one sample of an archive with it, by a name. `ground` is
    seen where it is transparent.
    """

    name: str
    stamp: str
    caption: str
    problem: str
    read: Callable[[], bytes | np.ndarray]
    digest: str = ""
    size: tuple[int, int] | None = None
    beside: Callable[[str], Item] | None = None
    is_clip: bool = False
    ground: str = "white"


def shown(name: str) -> str:
    """A name that can be printed: file names need not be UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def bad_item(name: str, problem: str) -> Item:
    """An item that is left out, and why."""
    return Item(shown(name), "", "", problem, _nothing)


def _nothing() -> bytes:
    raise BadPicture("there is nothing to read")


def file_stamp(path: Path) -> str:
    """Changes when the file does: its size and its time of change in nanoseconds."""
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


class Caption(NamedTuple):
    """A text, or what is wrong with it."""

    text: str
    problem: str


def read_caption(value: Any, settings: DataSettings) -> Caption:
    """A caption as text; bytes are decoded. None stands for an absent one."""
    if value is None and settings.default_caption is None:
        return Caption("", "it has no caption")
    if value is None:
        return Caption(settings.default_caption or "", "")
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return Caption("", f"its caption is not UTF-8 (byte {error.start + 1})")
    if not isinstance(value, str):
        return Caption("", f"its caption is no text but {value!r:.40}")
    if len(value) > MAX_CAPTION_BYTES:
        return Caption("", f"its caption has {len(value)} characters")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return Caption("", "its caption holds half of a character (a lone surrogate)")
    return Caption(value.strip(), "")
