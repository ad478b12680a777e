"""What every configuration shares: its error, its checks, and building one from `config.json`.

Field names are those of the diffusers and transformers `config.json` files, so that reading and
writing a configuration is the identity on names. No arrays, keys, devices or environment here.

Values come from files of strangers: every type is checked, and every size has a bound far above
all published ones, so that no file makes a network that takes minutes only to be described.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"]

MOST_LAYERS = 512
WIDEST = 2**17
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


class ConfigError(ValueError):
    """A configuration that no network can be built from; the message names the values."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless the `condition` holds."""
    if not condition:
        raise ConfigError(message)


def check_types(config: object) -> None:
    """Raises ConfigError for the first field whose value is not of its annotated type.

    NaN and infinity are no numbers, and neither are true and false.
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if not _fits(value, hint):
            raise ConfigError(
                f"{type(config).__name__}.{name} must be {_in_words(hint)}, "
                f"got {shown_value(value)}"
            )


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}


def kinds_of(cls: type, name: str) -> tuple[tuple[type, ...], bool]:
    """The classes that the field `name` of `cls` takes, and whether it may be None."""
    hint = _hints(cls)[name]
    kinds = get_args(hint) or (hint,)
    return tuple(kind for kind in kinds if kind is not NoneType), NoneType in kinds


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(part, get_args(hint)[0]) for part in value)
    if hint is float:
        return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)
    return type(value) is hint


def _in_words(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_in_words(part) for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return "a list, each " + _in_words(get_args(hint)[0])
    return WORDS.get(hint, f"a {getattr(hint, '__name__', hint)}")


def shown_value(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def in_range(config: object, lowest: int | float, highest: int | float, *names: str) -> None:
    """Raises ConfigError for the first of the fields that lies outside."""
    for name in names:
        value = getattr(config, name)
        if not lowest <= value <= highest:
            raise ConfigError(
                f"{type(config).__name__}.{name} must be from {lowest} to {highest}, "
                f"got {shown_value(value)}"
            )


def positive(config: object, *names: str) -> None:
    """Widths, heads, vocabularies: at least 1, and no more than any network could have."""
    in_range(config, 1, WIDEST, *names)


def layers(config: object, *names: str, lowest: int = 1) -> None:
    """Raises ConfigError unless each of these fields can be a number of layers."""
    in_range(config, lowest, MOST_LAYERS, *names)


def multiple(name: str, value: int, unit: int) -> None:
    """Raises ConfigError unless `value` is a positive multiple of `unit`, and names the nearest."""
    near = max(unit, unit * round(value / unit))
    require(
        value >= unit and value % unit == 0,
        f"{name} must be a multiple of {unit}, got {value}; {near} would do",
    )


def from_dict(cls: type, values: dict, /):
    """Build `cls` from a `config.json` dictionary; keys that are not fields are left aside."""
    fields = {field.name for field in dataclasses.fields(cls)}
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in fields}
    return cls(**{k: v for k, v in known.items() if v is not None})
