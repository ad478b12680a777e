"""A LoRA file in other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fluxjax.checkpoint.component_json import network_config
from fluxjax.checkpoint.engine import MappingError, listed
from fluxjax.checkpoint.lora.changes import Adapter
from fluxjax.checkpoint.lora.peft_config import PEFT_METADATA
from fluxjax.checkpoint.lora.reader import read_adapters
from fluxjax.checkpoint.lora.writer import write_adapters
from fluxjax.checkpoint.pipeline_folder import read_config
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import DEV, ConfigError
from fluxjax.config.choices import LoraNaming
from fluxjax.convert.destination import check_destination
from fluxjax.json_input import read_json
from fluxjax.networks import network_of


def convert_adapters(
    source: Path,
    destination: Path,
    naming: LoraNaming,
    *,
    config: Path | None = None,
    dtype: str = "keep",
    overwrite: bool = False,
) -> str:
    """Write `source` to `destination`, alpha being the rank; returns what it is, in words.

    `config`: the model that it adapts, a pipeline's folder or a network's config.json; by default
    FLUX.1 of the published size. `dtype`: keep is float32, in which scales lose nothing.
    Raises ConfigError naming every change that is no low-rank product, and what `read_adapters`
    does.
    """
    if destination.suffix != ".safetensors":
        raise ConfigError(f"{destination}: a LoRA is written as one .safetensors file")
    check_destination(source, destination, overwrite)
    model = _networks(config)
    templates = {name: abstract_params(part) for name, part in model.items()}
    try:
        changes, metadata = read_adapters(source, templates)
    except MappingError as error:
        asked = "" if config else "\n  of another model than FLUX.1? give its folder with --config"
        raise MappingError(f"{error}{asked}") from None
    others = [
        name
        for mine in changes.values()
        for name, change in mine.items()
        if change.low_rank is None
    ]
    if others:
        what = "change by more than a low-rank product: only merging into a model keeps that"
        raise ConfigError(f"{source}: {listed(what, others)}")
    adapters: dict[str, dict[str, Adapter]] = {}
    for component, mine in changes.items():
        found = {n.removesuffix(".weight"): c.low_rank for n, c in mine.items()}
        adapters[component] = {name: one for name, one in found.items() if one is not None}
    metadata = {k: v for k, v in metadata.items() if k != PEFT_METADATA}
    write_adapters(
        destination,
        adapters,
        metadata,
        naming=naming,
        model=model,
        dtype=None if dtype == "keep" else jnp.dtype(dtype),
    )
    counts = ", ".join(f"{len(mine)} modules of the {name}" for name, mine in adapters.items())
    return f"{counts}, in the names of {naming}"


def _networks(path: Path | None) -> dict[str, Any]:
    if path is not None and path.is_file():
        one = network_config(read_json(path), path)
        network = network_of(one)
        if not network.adapter_prefixes:
            raise ConfigError(f"{path}: a {network.words} has no adapters")
        return {network.component: one}
    networks = (DEV if path is None else read_config(path)).networks
    return {n: one for n, one in networks.items() if network_of(one).adapter_prefixes}
