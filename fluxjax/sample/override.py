"""Settings by name, from where no type is sure: JSON, a line of a file, a keyword of Python."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_args

from fluxjax.config import ConfigError
from fluxjax.config.choices import TOLD_PAIRS, Respacing, Spacing
from fluxjax.sample.settings import (
    FIELDS,
    PICTURES,
    TEXTS,
    Noise,
    Rounding,
    Settings,
    VideoKind,
    brief,
)

_REALS = (
    "guidance",
    "true_cfg",
    "strength",
    "eta",
    "guidance_rescale",
    "flow_shift",
    "image_guidance",
    "aesthetic_score",
    "negative_aesthetic_score",
    "skip_layer_scale",
    "refiner_start",
)
_KINDS = {
    **dict.fromkeys(("steps", "width", "height", "seed", "max_sequence_length"), "an integer"),
    **dict.fromkeys(_REALS, "a number"),
    **dict.fromkeys(TEXTS, "a text"),
    **dict.fromkeys((*PICTURES, *(f"{name}_sha256" for name in PICTURES)), "a text"),
    **dict.fromkeys(("mask_crop", "clip_skip", "frames", "fps", "motion"), "an integer"),
    **dict.fromkeys(
        ("soft_mask", "noise_mask", "size_bins", "clean_caption", "oscillation", "loop"),
        "true or false",
    ),
    "video_kind": " or ".join(get_args(VideoKind)),
    **dict.fromkeys(("expand", "canny", "skip_layers", *TOLD_PAIRS), "a list of integers"),
    "control_mode": "a list of texts",
    **dict.fromkeys(
        ("control_scale", "control_range", "ip_scale", "skip_layer_range"), "a list of numbers"
    ),
    "sampler": "a text",
    "spacing": " or ".join(get_args(Spacing)),
    "sigmas": " or ".join(get_args(Respacing)),
    "noise": " or ".join(get_args(Noise)),
    "rounding": " or ".join(get_args(Rounding)),
}
_EACH: dict[str, tuple[type, ...]] = {
    "a list of integers": (int,),
    "a list of numbers": (int, float),
    "a list of texts": (str,),
}


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _typed(name: str, value: Any) -> Any:
    """A value from outside (JSON, a keyword) as its field wants it, or ConfigError."""
    kind = _KINDS[name]
    if kind == "an integer" and type(value) is int:
        return value
    if kind == "a number" and isinstance(value, int | float) and not isinstance(value, bool):
        return _as_float(value)
    if kind == "true or false" and isinstance(value, bool):
        return value
    types = _EACH.get(kind, ())
    if types and isinstance(value, list | tuple) and all(type(one) in types for one in value):
        return tuple(map(_as_float, value) if float in types else value)
    if isinstance(value, str) and (kind == "a text" or value in kind.split(" or ")):
        return value
    raise ConfigError(f"{name} must be {kind}, got {brief(value)}")


def override(settings: Settings, values: Mapping[str, Any], where: str = "") -> Settings:
    """`settings` with some of them replaced; values that are None are left aside.

    A new picture makes the hash of the old one void.

    Raises ConfigError, beginning with `where`, for a name that is no setting.
    """
    prefix = f"{where}: " if where else ""
    unknown = ", ".join(brief(name) for name in values if name not in FIELDS)
    if unknown:
        known = ", ".join(name for name in FIELDS if not name.endswith("_sha256"))
        raise ConfigError(f"{prefix}{unknown} is no setting; there are {known}")
    try:
        given = {name: _typed(name, value) for name, value in values.items() if value is not None}
        for name in PICTURES:
            if name in given:
                given.setdefault(f"{name}_sha256", None)
        return dataclasses.replace(settings, **given)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None
