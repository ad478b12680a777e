"""What modules are called in files of kohya and ComfyUI: by the names of the original code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fluxjax.checkpoint.lora.changes import Adapter
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import DEV, ConfigError
from fluxjax.config.choices import LoraNaming
from fluxjax.models.lora import dense_sites
from fluxjax.networks import network_of
from fluxjax.networks.tables import Rule

# What ComfyUI calls text encoders by their kind: the first one, and a further one.
_COMFY = {"text_encoder": ("clip_l", "clip_g"), "text_encoder_2": ("t5xxl", "t5xxl")}
_OPENCLIP_H = 1024  # its width: "clip_h", of Stable Diffusion 2


def prefix_of(naming: LoraNaming, component: str, model: Mapping[str, Any] | None = None) -> str:
    """What stands before the modules' names of a component. `model`: see `write_adapters`."""
    if naming == "peft":
        return f"{component}."
    model = model or DEV.networks
    config = model[component]
    kind = network_of(config).component
    further = component != kind
    if kind not in _COMFY:
        return "lora_unet_" if naming == "kohya" else "diffusion_model."
    if naming == "comfy":
        clip_h = kind == "text_encoder" and config.hidden_size == _OPENCLIP_H
        return f"text_encoders.{'clip_h' if clip_h else _COMFY[kind][further]}.transformer."
    if further:
        return f"lora_te{component.removeprefix('text_encoder').removeprefix('_') or 1}_"
    if kind == "text_encoder_2":
        return "lora_te3_"
    counted = "unet" not in model or "text_encoder_2" in model
    return "lora_te1_" if counted else "lora_te_"


def in_original_names(
    adapters: Mapping[str, Adapter], naming: LoraNaming, config: Any
) -> dict[str, Adapter]:
    """Adapters under the original module names of a network; of modules that are one there, parts
    that are not adapted get rows of zeros."""
    known = network_of(config)
    dialect = known.adapter_dialect(config, naming)
    if not known.has_dialect(dialect) or dialect == "published":
        return dict(adapters)
    rules = known.dialect(dialect).table(config).rules
    sites = dense_sites(abstract_params(config))
    widths = {name: site.shape[1] for site in sites for name in site.names}
    left, found = dict(adapters), {}
    for theirs, names, rule in _matched(adapters, rules):
        if not left.keys() & set(names):
            continue
        joined = _join([left.pop(part) if part in left else widths[part] for part in names])
        if rule.swap_halves:
            joined = joined._replace(b=np.roll(joined.b, len(joined.b) // 2, axis=0))
        found[theirs] = joined
    if left:
        raise ConfigError(f"{next(iter(left))} has no name in the original code")
    return found


def _matched(
    adapters: Mapping[str, Adapter], rules: tuple[Rule, ...]
) -> Iterator[tuple[str, list[str], Rule]]:
    """(module of theirs, ours that it consists of, rule) of each of our modules."""
    plain = {ours: rule for rule in rules for ours in rule.ours if "{}" not in ours}
    patterns = [
        (re.compile(re.escape(ours).replace(r"\{\}", r"(\d+)")), rule)
        for rule in rules
        for ours in rule.ours
        if "{}" in ours
    ]
    for name in adapters:
        if name in plain:
            yield plain[name].theirs, list(plain[name].ours), plain[name]
            continue
        for pattern, rule in patterns:
            if match := pattern.fullmatch(name):
                numbers = match.groups()
                ours = [part.format(*numbers) for part in rule.ours]
                yield rule.theirs.format(*numbers), ours, rule
                break


def _join(parts: list[Adapter | int]) -> Adapter:
    """One adapter with the outputs of several, one after the other; a number is rows of zeros."""
    if len(parts) == 1 and isinstance(parts[0], Adapter):
        return parts[0]
    adapters = [part for part in parts if isinstance(part, Adapter)]
    a = np.concatenate([part.a for part in adapters])
    rows = sum(part if isinstance(part, int) else len(part.b) for part in parts)
    b = np.zeros((rows, len(a)), adapters[0].b.dtype)
    row = column = 0
    for part in parts:
        if isinstance(part, int):
            row += part
            continue
        high, wide = part.b.shape
        b[row : row + high, column : column + wide] = part.b * part.scale
        row, column = row + high, column + wide
    return Adapter(a, b, 1.0)
