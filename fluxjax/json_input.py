"""JSON that strangers wrote: parsed, or refused with one reason, and nothing else."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from fluxjax.named_errors import naming

MAX_BYTES = 64 * 2**20
_MAX_VALUES = 2**22  # read in about a second; a tokenizer of 256,000 words has 2.5 million
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_MAX_DIGITS = 300  # a float holds 308


def parse_json(data: bytes | str, *, unique: bool = False, unlimited: bool = False) -> Any:
    """The value. `unique` refuses objects in which a key occurs twice; `unlimited` reads Infinity
    and -Infinity, which PyTorch's libraries write for a limit that there is not.

    Raises ValueError, in words that follow the name of the file: not JSON in UTF-8, nested too
    deeply, more than `MAX_BYTES` or of too many values, lone surrogates, numbers that no float
    holds.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes, more than {MAX_BYTES}")
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        if sum(map(text.count, ",[{")) > _MAX_VALUES:
            raise ValueError(f"it has more than {_MAX_VALUES} values")
        value = json.loads(
            text,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_limit if unlimited else _number,
            object_pairs_hook=_unique if unique else None,
        )
        if _HALF.search(text):  # only an escape can write half a character
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is not JSON that can be read: it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it is not JSON that can be read: it has a lone surrogate") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    return value


def read_json(path: Path, *, unlimited: bool = False) -> dict[str, Any]:
    """As `parse_json`; raises FileNotFoundError, or ValueError if it is no JSON object that can be
    read."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has more than the {MAX_BYTES} bytes that are read as JSON")
    with naming(path):
        data = path.read_bytes()
    try:
        values = parse_json(data, unlimited=unlimited)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} should hold a JSON object, got {type(values).__name__}")
    return values


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is no finite number")
    return value


def _limit(name: str) -> float:
    return float(name) if name.endswith("Infinity") else _number(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a name occurs twice in it")
    return keys
