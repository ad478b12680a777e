"""Reading adapter files: LoRA and its relatives, in every common naming.

What a file holds is used whole or refused whole, with every name that does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fluxjax.checkpoint.detect import detect_network
from fluxjax.checkpoint.engine import MappingError, listed
from fluxjax.checkpoint.file_format import PICKLES, pickle_refusal
from fluxjax.checkpoint.lora.changes import Adapter, Change
from fluxjax.checkpoint.lora.formed import changes_of
from fluxjax.checkpoint.lora.names import grouped, is_of_adapter, known_network
from fluxjax.checkpoint.lora.peft_config import read_peft_config
from fluxjax.checkpoint.lora.scaled_file import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from fluxjax.checkpoint.safetensors_file import read_safetensors
from fluxjax.config import ConfigError
from fluxjax.models.lora import adapter_sites
from fluxjax.models.names import unflatten
from fluxjax.shapes import Params

Changes = dict[str, Change]
"""Published name of a parameter -> what becomes of it."""


class AdapterFile(NamedTuple):
    """What a file makes of each network's parameters, by component, and its metadata."""

    changes: dict[str, Changes]
    metadata: dict[str, str]


class LoraFile(NamedTuple):
    """A LoRA tree of numpy arrays in the form of the parameters, and the file's metadata."""

    tree: dict[str, Any]
    metadata: dict[str, str]


def read_adapters(path: Path, networks: Mapping[str, Params]) -> AdapterFile:
    """The adapters in a safetensors file or PEFT's folder.

    `networks`: what may be adapted, by component: parameters (arrays or ShapeDtypeStructs).
    Raises MappingError listing every tensor that is unknown, missing, doubled, mis-shaped or not
    finite; ConfigError for what is no adapter or of a kind that is not read; ValueError for a
    damaged file.
    """
    path = lora_path(Path(path))
    raw, metadata = read_safetensors(path)
    _refuse_others(path, raw)
    known = [known_network(component, params) for component, params in networks.items()]
    groups, errors = grouped(raw, known)
    changes: dict[str, Changes] = {}
    try:
        adapted = {group.network.component for group in groups}
        alone = len(adapted) == 1
        configs = {c: read_peft_config(path, metadata, c, alone=alone) for c in adapted}
        if not any(config.where for config in configs.values()) and _is_peft_folders(raw):
            raise ConfigError(
                f"how much it counts is in {ADAPTER_CONFIG}, which was saved with it: put that "
                "beside it"
            )
        for group in groups:
            component = group.network.component
            found, wrong = changes_of(group, configs[component])
            mine = changes.setdefault(component, {})
            errors += wrong
            errors += [
                f"doubled: {group.module} is {name.rpartition('.')[0]}, adapted already"
                for name in found
                if name in mine
            ]
            mine |= found
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    for network in known:
        if here := changes.get(network.component):
            targeted = configs[network.component].targeted(network.linear)
            errors += [f"missing: {n}" for n in targeted if f"{n}.weight" not in here]
    if errors:
        whose = " or ".join(f"{component}" for component in networks)
        raise MappingError(f"{path}: {listed(f'do not fit as a LoRA of this {whose}', errors)}")
    if not raw:
        raise ConfigError(f"{path} holds no LoRA: it has no tensors")
    return AdapterFile(changes, metadata)


def read_lora(path: Path, params: Params, *, dtype: Any = np.float32) -> LoraFile:
    """A file of low-rank products alone for a FLUX transformer whose parameters look like `params`.

    Where it adapts some layers of a stack only, or with several ranks, the rest is zero.
    Raises what `read_adapters` does, and ConfigError naming a change that is no such product.
    """
    changes, metadata = read_adapters(path, {"transformer": params})
    adapters, others = split_low_rank(changes.get("transformer", {}), params)
    if others:
        more = f", and {len(others) - 1} more" * (len(others) > 1)
        first = next(iter(others))
        raise ConfigError(f"{path} does more than add low-rank products: it changes {first}{more}")
    return LoraFile(low_rank_tree(adapters, params, dtype=dtype), metadata)


def split_low_rank(changes: Changes, params: Params) -> tuple[dict[str, Adapter], Changes]:
    """(low-rank products by module, all other changes) of a network with LoRA in its layers."""
    sites = {f"{name}.weight" for site in adapter_sites(params) for name in site.names}
    adapters = {
        name.removesuffix(".weight"): change.low_rank
        for name, change in changes.items()
        if change.low_rank is not None and name in sites
    }
    others = {n: c for n, c in changes.items() if n.removesuffix(".weight") not in adapters}
    others |= {n: c for n, c in changes.items() if not n.endswith(".weight")}
    return adapters, others


def low_rank_tree(
    adapters: Mapping[str, Adapter], params: Params, *, dtype: Any = np.float32
) -> dict[str, Any]:
    """The tree beside `params` (see `fluxjax.models.lora`); what is not adapted is zero."""
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for site in adapter_sites(params):
        members = [adapters.get(name) for name in site.names]
        rank = max((len(m.a) for m in members if m is not None), default=0)
        if not rank:
            continue
        (fan_in, out), layers = site.shape, len(members)
        a = np.zeros((layers, *site.window, fan_in, rank), dtype)
        b, scale = np.zeros((layers, rank, out), dtype), np.zeros(layers, np.float32)
        for i, member in enumerate(members):
            if member is not None:
                own, (down, up) = slice(len(member.a)), member.kernels()
                # Another adapter may have given the layer more inputs.
                a[i, ..., : down.shape[-2], own], b[i, own] = down, up
                scale[i] = member.scale
        for name, leaf in (("a", a), ("b", b), ("scale", scale)):
            flat[*site.module, name] = leaf if site.stacked else leaf[0]
    return unflatten(flat)


def _is_peft_folders(names: Collection[str]) -> bool:
    """Names that only PEFT writes, and no alpha; BFL's names under its prefix are fal's."""
    peft = bool(names) and all(name.startswith("base_model.model.") for name in names)
    return peft and not any(
        re.search(r"(double|single)_blocks\.|alpha$", name.replace("single_transformer", ""))
        for name in names
    )


def lora_path(path: Path) -> Path:
    """The weights of a LoRA, which may be given as PEFT's folder.

    Raises FileNotFoundError, and ValueError for a pickle.
    """
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            pickles = [file for file in sorted(path.iterdir()) if file.suffix in PICKLES]
            if pickles:
                raise ValueError(pickle_refusal(pickles[0]))
            raise FileNotFoundError(f"{path} holds no LoRA: it has no .safetensors file")
        named = [file for file in files if file.name == ADAPTER_WEIGHTS] or files
        if len(named) > 1:
            names = ", ".join(file.name for file in named)
            raise ValueError(f"{path} holds several LoRAs, name one of: {names}")
        return named[0]
    if path.suffix.lower() in PICKLES:
        raise ValueError(pickle_refusal(path))
    if not path.exists():
        raise FileNotFoundError(f"there is no LoRA file {path}")
    return path


def _refuse_others(path: Path, names: Collection[str]) -> None:
    if not names or any(map(is_of_adapter, names)):
        return
    some = next(iter(names))
    try:
        network, _ = detect_network(dict.fromkeys(names, ()))
        what = f"it is a whole {network.words}, to be given as a model"
    except ConfigError:
        what = f"none of its {len(names)} tensors is one of a LoRA"
    raise ConfigError(f"{path} is no LoRA: {what} (it has {some!r})")
