"""`config.json` files of diffusers and transformers <-> our configuration dataclasses.

A key that a file leaves out has the default of the PyTorch class, which is not always FLUX's.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxjax.config import PIPELINES, ConfigError, PipelineConfig, SchedulerConfig, from_dict
from fluxjax.config.base import WORDS, shown_value
from fluxjax.config.sampler import DEFAULTS, SamplerConfig
from fluxjax.json_input import read_json
from fluxjax.networks import NETWORKS
from fluxjax.networks.network import JsonForm

_DIFFUSERS_VERSION = "0.30.0"


def _read_sampler(values: dict[str, Any]) -> dict[str, Any]:
    found = {**values, "sampler": values["_class_name"]}
    if found.get("lambda_min_clipped") == -math.inf:  # how DPM-Solver's file says: no limit
        del found["lambda_min_clipped"]
    return found


_FORMS: dict[type, JsonForm] = {
    **{cls: network.json for cls, network in NETWORKS.items()},
    SchedulerConfig: JsonForm(
        "diffusers",
        ("FlowMatchEulerDiscreteScheduler",),
        defaults={"shift": 1.0, "use_dynamic_shifting": False},
        required={
            "shift_terminal": None,
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "invert_sigmas": False,
            "stochastic_sampling": False,
            "time_shift_type": "exponential",
        },
    ),
    SamplerConfig: JsonForm(
        "diffusers",
        tuple(DEFAULTS),
        read=_read_sampler,
        write=lambda config, values: {
            name: value for name, value in values.items() if value is not None and name != "sampler"
        },
        written_class=lambda config: config.sampler,
    ),
}


def pipeline_class(folder: Path) -> type[PipelineConfig]:
    """The configuration of the class that a pipeline folder's model_index.json names.

    Raises FileNotFoundError, ValueError; ConfigError, naming it, for one of no family of ours.
    """
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    for config in PIPELINES:
        if isinstance(name, str) and re.fullmatch(config.class_names, name):
            return config
    what = f"a {str(name)[:100]}" if name else "a pipeline without a name"
    raise ConfigError(
        f"{folder} holds {what}, which fluxjax cannot read yet, not a FLUX.1, Stable "
        "Diffusion, PixArt, Open-Sora or HunyuanVideo pipeline"
    )


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Indented and sorted; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def network_config(values: dict[str, Any], path: Path) -> Any:
    """The configuration in a config.json of any network of ours.

    Raises ConfigError, naming `path`, if it is of another network.
    """
    name, kind = _names(values, path)
    for cls, network in NETWORKS.items():
        form = network.json
        if name in form.class_names or (not name and kind and kind in form.model_types):
            return parse_config(cls, values, path)
    known = ", ".join(network.json.class_names[0] for network in NETWORKS.values())
    if not (name or kind):
        if "model_name" not in values:
            raise ConfigError(f"{path} names no network; fluxjax reads {known}")
        try:  # Open-Sora's deep-compression autoencoders say no more
            return original_config(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    raise ConfigError(
        f"{path} is of {(name or kind)[:100]}, which fluxjax cannot read yet; it reads {known}"
    )


def original_config(params: Mapping[str, Any]) -> Any:
    """The original code's own configuration of a network, such as BFL's FluxParams -> ours.

    Raises KeyError for a missing key, ConfigError for values of no network of ours.
    """
    for network in NETWORKS.values():
        for dialect in network.dialects:
            if dialect.from_original is not None and dialect.original_key in params:
                try:
                    return dialect.from_original(params)
                except (TypeError, ZeroDivisionError) as error:
                    raise ConfigError(f"no configuration of the {network.words}: {error}") from None
    raise ConfigError(f"no network has a configuration with the keys {', '.join(sorted(params))}")


def _names(values: dict[str, Any], path: Path) -> tuple[str, str]:
    """The class and transformers' architecture that a file names, "" for none."""
    classes = values.get("architectures") or [""]
    if not isinstance(classes, list):
        raise ConfigError(f"{path}: architectures must be a list of names, got {classes!r}")
    found = {
        "_class_name": values.get("_class_name") or classes[0],
        "model_type": values.get("model_type") or "",
    }
    for key, name in found.items():
        if not isinstance(name, str):
            raise ConfigError(f"{path}: {key} must be a name, got {name!r}")
    return found["_class_name"], found["model_type"]


def read_config_json(cls: type | tuple[type, ...], path: Path) -> Any:
    """The dataclass `cls`, or one of several, of a config.json; of a whole CLIP's, the part that is
    asked for.

    Raises FileNotFoundError; ConfigError for another network, naming both, and for values that no
    network of ours has.
    """
    kinds = cls if isinstance(cls, tuple) else (cls,)
    values = read_json(path, unlimited=SamplerConfig in kinds)  # of DPM-Solver's noise levels
    name, kind = _names(values, path)
    for one in kinds:
        form = _FORMS[one]
        if name in form.class_names or (not name and kind in (*form.model_types, "")):
            return parse_config(one, values, path)
    config = network_config(values, path) if kinds[0] in NETWORKS else None
    for part in NETWORKS[type(config)].parts.values() if config is not None else ():
        if type(getattr(config, part)) in kinds:
            return getattr(config, part)
    expected = [known for one in kinds for known in _FORMS[one].class_names]
    raise ConfigError(f"{path} is of {(name or kind)[:100]}, expected {' or '.join(expected)}")


def parse_config(cls: type, values: dict[str, Any], path: Path) -> Any:
    """`cls` of the values of a file. Raises ConfigError that names `path`, key and value."""
    form = _FORMS[cls]
    for key, wanted in form.required.items():
        if values.get(key, wanted) != wanted:
            raise ConfigError(f"{path}: {key}={values[key]!r} is not supported, only {wanted!r}")
    given = {**form.defaults, **{k: v for k, v in values.items() if v is not None}}
    for key, kind in form.unread.items():
        if type(given.get(key, kind())) is not kind:
            wanted = WORDS[kind]
            raise ConfigError(f"{path}: {key} must be {wanted}, got {shown_value(given[key])}")
    try:
        given = form.read(given)
        for field in dataclasses.fields(cls):
            part = type(field.default)
            if part in NETWORKS and field.name in given:
                given[field.name] = parse_config(part, given[field.name], path)
        return from_dict(cls, given)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def config_json(config: Any, dtype: str | None = None) -> dict[str, Any]:
    """What diffusers or transformers write for this configuration."""
    form = _FORMS[type(config)]
    values: dict[str, Any] = {}
    nested: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) in NETWORKS:
            nested[field.name] = config_json(value)
        else:
            values[field.name] = list(value) if isinstance(value, tuple) else value
    values = form.write(config, values) | nested
    name = form.class_name(config)
    if form.library == "diffusers":
        return values | {"_class_name": name, "_diffusers_version": _DIFFUSERS_VERSION}
    values = {"model_type": form.model_types[0], **values, "architectures": [name]}
    return values | ({"torch_dtype": dtype} if dtype else {})
