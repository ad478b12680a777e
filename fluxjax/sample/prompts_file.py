"""Files of prompts: JSON lines with settings, or plain text with one prompt per line."""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from fluxjax.config import ConfigError
from fluxjax.json_input import MAX_BYTES
from fluxjax.named_errors import naming
from fluxjax.sample.override import override
from fluxjax.sample.settings import ALPHA, FIELDS, PICTURES, Settings, brief

STANDARD_INPUT = Path("-")
_JSON_NAMES = (".jsonl", ".ndjson", ".json")
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


class Line(NamedTuple):
    """What one line asks for; `where` begins every error about it.

    `lora` None: those of the command line. Paths, from the file's folder, are in full.
    """

    where: str
    values: dict[str, Any]
    lora: tuple[str, ...] | None = None
    number: int | None = None


def read_prompts(path: Path) -> list[Line]:
    """Every line of a file that is not blank; `-` is standard input.

    A file named .jsonl, .ndjson or .json, or whose first line is a JSON object or text, has JSON
    on every line: a text, or an object of settings, `lora` and `number`. Any other is plain text.
    UTF-8, or UTF-16 with its mark; lines end in LF, CRLF or CR.
    Raises OSError, or ConfigError that names the line.
    """
    standard = path == STANDARD_INPUT
    name = "standard input" if standard else str(path)
    with naming(path), nullcontext(sys.stdin.buffer) if standard else open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:  # a device, a pipe without an end, or what is no prompts
        raise ConfigError(f"{name} has more than the {MAX_BYTES >> 20} MiB that prompts may have")
    lines = list(_texts(data, name))
    if not lines:
        raise ConfigError(f"{name} has no prompts")
    if path.suffix.lower() in _JSON_NAMES or isinstance(_json(lines[0][1]), dict | str):
        folder = Path() if standard else path.parent
        return [_settings(where, text, folder) for where, text in lines]
    for where, text in lines:
        if isinstance(_json(text), dict):
            raise ConfigError(f"{where}: JSON, but the first line is plain text: {brief(text)}")
    return [Line(where, {"prompt": text}) for where, text in lines]


def _texts(data: bytes, name: str) -> Iterator[tuple[str, str]]:
    """(where, line) of what is not blank."""
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    data = data.removeprefix(mark)
    if encoding != "utf-8":
        data = data.decode(encoding, "replace").encode()
    # Not str.splitlines, which also breaks lines at characters that JSON texts may hold.
    for number, raw in enumerate(re.split(rb"\r\n|\n|\r", data), start=1):
        where = f"{name}, line {number}"
        try:
            text = raw.decode().strip()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{where}: not UTF-8 (byte 0x{raw[error.start]:02x} at {error.start + 1})"
            ) from None
        if text:
            yield where, text


def _json(text: str) -> Any:
    """The value, or None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _settings(where: str, text: str, folder: Path) -> Line:
    try:
        values = json.loads(text)
    except RecursionError:
        raise ConfigError(f"{where}: not JSON (nested too deeply)") from None
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error})") from None
    if isinstance(values, str):
        values = {"prompt": values}
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: must be a text or an object of settings, got {brief(values)}")
    lora, number = values.pop("lora", None), values.pop("number", None)
    if lora is not None:
        lora = [lora] if isinstance(lora, str) else lora
        if not isinstance(lora, list) or not all(isinstance(one, str) for one in lora):
            raise ConfigError(f"{where}: lora must be a text or a list of texts, got {brief(lora)}")
        lora = tuple(_beside(one, folder, where) for one in lora)
    if number is not None and (type(number) is not int or not 1 <= number <= 2**20):
        raise ConfigError(f"{where}: number must be an integer of at least 1, got {brief(number)}")
    unknown = [name for name in values if name not in FIELDS]
    if unknown:
        typed = (name for name in FIELDS if not name.endswith("_sha256"))
        known = ", ".join((*typed, "lora", "number"))
        raise ConfigError(f"{where}: {brief(unknown[0])} is no setting; there are {known}")
    for name in PICTURES:
        if isinstance(values.get(name), str) and (name, values[name]) != ("mask", ALPHA):
            values[name] = _beside(values[name], folder, where)
    override(Settings(), values, where)  # what is wrong shows before the first picture
    return Line(where, values, lora, number)


def _beside(path: str, folder: Path, where: str) -> str:
    try:
        return str((folder / Path(path).expanduser()).absolute())
    except RuntimeError:
        raise ConfigError(f"{where}: there is no user of the name in {brief(path)}") from None
