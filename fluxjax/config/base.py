"""What every configuration shares: its error, its checks, and building one from `config.json`.

Field names are those of the diffusers and transformers `config.json` files, so that reading and
writing a configuration is the identity on names. No arrays, keys, devices or environment here.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu"]


class ConfigError(ValueError):
    """A configuration that no network can be built from; the message names the values."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{type(config).__name__}.{name} must be positive, got {value}")


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
