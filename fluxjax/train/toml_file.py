"""TOML files read into frozen dataclasses, checked key by key, and written back."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fluxjax.config import ConfigError
from fluxjax.named_errors import naming

T = TypeVar("T")
_MAX_BYTES = 2**20
# Keys of so many parts, whose time of parsing grows with the square of their number.
_LONG_KEY = re.compile(rb"(?<![\w\"'-])(?:[\w\"'-]++[ \t]*+\.[ \t]*+){100}")


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file. Raises ConfigError if there is none or it is not TOML."""
    try:
        with naming(path), open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"there is no recipe {path}") from None
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{path} is no recipe: it has more than {_MAX_BYTES >> 20} MiB")
    try:
        if _LONG_KEY.search(content):
            raise RecursionError
        return tomllib.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise ConfigError(f"{path} is not TOML that can be read: it is nested too deeply") from None
    except ValueError as error:  # no TOML, no UTF-8, or a number of thousands of digits
        raise ConfigError(f"{path} is not TOML: {error}") from None


def build(cls: type[T], values: dict[str, Any], where: str) -> T:
    """An instance of the dataclass `cls` from plain values; what is not given is the default."""
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    converted = {}
    for name, value in values.items():
        if name not in names:
            near = nearest(name, names) or f"; known are {', '.join(names)}"
            raise ConfigError(f"{where}: unknown key {_short(name)}{near}")
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict):
            converted[name] = build(hints[name], value, f"{where} [{name}]")  # pyright: ignore[reportArgumentType]
            continue
        try:
            converted[name] = _convert(hints[name], value)
        except TypeError:
            near = nearest(_short(value).strip("'"), [str(v) for v in _literals(hints[name])])
            wanted = _describe(hints[name])
            got = _short(value)
            raise ConfigError(f"{where}: {name} must be {wanted}, got {got}{near}") from None
    try:
        return cls(**converted)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def check_values(settings: Any, prefix: str = "") -> None:
    """Raises ConfigError for a number that is not finite, and for text that no file can hold."""
    for field in dataclasses.fields(settings):
        name, value = f"{prefix}{field.name}", getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            check_values(value, f"{name}.")
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, float) and not math.isfinite(one):
                raise ConfigError(f"{name} must be a finite number, got {one}")
            if isinstance(one, int) and abs(one) >= 2**63:
                raise ConfigError(f"{name} must be a number of 64 bits, got {_short(one)}")
            if isinstance(one, str | Path) and not _is_text(str(one)):
                raise ConfigError(f"{name} is not UTF-8 (a lone surrogate): {_short(str(one))}")


def _is_text(text: str) -> bool:
    try:
        return bool(text.encode()) or True
    except UnicodeEncodeError:
        return False


def _short(value: Any) -> str:
    """The value as Python writes it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(name: str, known: Any) -> str:
    """`; did you mean 'steps'?`, or nothing where no known name is near."""
    found = difflib.get_close_matches(name, [*known], n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def _convert(hint: Any, value: Any) -> Any:
    """`value` as the type `hint`. Raises TypeError."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for option in args:
            try:
                return _convert(option, value)
            except TypeError:
                pass
    elif origin is Literal:
        if any(value == legal and type(value) is type(legal) for legal in args):
            return value
    elif origin is tuple and isinstance(value, list):
        kinds = args[:1] * len(value) if args[1:] == (...,) else args
        if len(kinds) == len(value):
            return tuple(_convert(kind, v) for kind, v in zip(kinds, value, strict=True))
    elif hint is float and type(value) in (int, float):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    elif hint is Path and isinstance(value, str) and value:  # nothing is not the current folder
        return Path(value)
    elif type(value) is hint:
        return value
    raise TypeError


def _literals(hint: Any) -> tuple:
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(v for o in options if get_origin(o) is Literal for v in get_args(o))


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_describe(option) for option in args if option is not NoneType)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        if args[1:] == (...,):
            return f"a list of {_describe(args[0])}"
        return f"a list [{', '.join(_describe(a) for a in args)}]"
    if dataclasses.is_dataclass(hint):
        return "a table"
    words: dict[type, str] = {Path: "a path", str: "a string", bool: "true or false"}
    return words.get(hint) or str(hint.__name__)


def to_toml(recipe: Any, prefix: str = "") -> str:
    """The recipe as TOML that `build` reads back; values not given stand as comments."""
    lines, tables = [], []
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            name = f"{prefix}{field.name}"
            tables.append(f"\n[{name}]\n{to_toml(value, f'{name}.')}")
        elif value is None:
            lines.append(f"# {field.name} = (by default)\n")
        else:
            lines.append(f"{field.name} = {_toml_value(value)}\n")
    return "".join(lines + tables)


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    # JSON escapes as TOML does, but for DEL, which TOML forbids and JSON does not.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
