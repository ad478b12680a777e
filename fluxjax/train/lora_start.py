"""A LoRA's file that training goes on from: its low-rank products learn on, and all else that it
changes stays as it is, below them and in the file that is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.lora.changes import Adapter
from fluxjax.checkpoint.lora.merge import merge
from fluxjax.checkpoint.lora.reader import (
    Changes,
    low_rank_tree,
    read_adapters,
    split_low_rank,
)
from fluxjax.checkpoint.opened_network import OpenNetwork
from fluxjax.checkpoint.pipeline_folder import adapter_defaults
from fluxjax.checkpoint.source import open_component
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import ConfigError, LoraConfig, PipelineConfig
from fluxjax.hub import find
from fluxjax.models.lora import matches
from fluxjax.models.names import flatten, unflatten
from fluxjax.networks import network_of
from fluxjax.train.recipe import FinetuneRecipe
from fluxjax.train.step import Tree
from fluxjax.train.wider_input import added_inputs


class LoraStart(NamedTuple):
    """What a file holds, by component; empty where a run begins with nothing."""

    products: dict[str, dict[str, Adapter]]
    """That learn on, by published module."""
    others: dict[str, Changes]
    """Of parameters, that stay."""
    defaults: dict[str, Any]
    """How it says to be sampled."""


def read_start(recipe: FinetuneRecipe, base: PipelineConfig, config: PipelineConfig) -> LoraStart:
    """What `recipe.lora_start` names. `config`: what the model becomes.

    Raises ConfigError for a file that the recipe's LoRA does not hold, and what `read_adapters`
    raises.
    """
    if not recipe.lora_start:
        return LoraStart({}, {}, {})
    file, own = find(recipe.lora_start, "lora"), recipe.lora.components_of(config)
    networks = {
        name: abstract_params(network)
        for name, network in config.networks.items()
        if network_of(network).adapter_prefixes
    }
    found = read_adapters(file, networks)
    for name in found.changes.keys() - own.keys():
        raise ConfigError(
            f"lora_start: {file} adapts the {name}, which does not learn here: name it in "
            "lora.text_encoders"
        )
    first, products, others = config.denoiser, {}, {}
    added = added_inputs(base.networks[first], config.networks[first])
    for name, changes in found.changes.items():
        new = added if name == first else {}
        products[name], others[name] = _that_learn(changes, networks[name], own[name], new)
        _check_ranks(f"{file} has rank", name, products[name], own, new)
    _check(recipe, file, products, others)
    for layer in added:
        if (change := others.get(first, {}).get(f"{layer}.weight")) is not None:
            inputs = flatten(networks[first])[layer, "kernel"].shape[0]
            others[first][f"{layer}.weight"] = dataclasses.replace(change, inputs=inputs)
    return LoraStart(products, others, adapter_defaults(file, found.metadata))


def _that_learn(
    changes: Changes, params: Tree, lora: LoraConfig, added: Mapping[str, int]
) -> tuple[dict[str, Adapter], Changes]:
    """(products in layers that are meant by the recipe's targets or get inputs, the rest)."""

    def learns(module: str, adapter: Adapter) -> bool:
        if adapter.a.ndim != 2:  # of a convolution
            return False
        if module in added:  # whose adapter has that rank, see `init_lora`
            return len(adapter.a) == added[module]
        return any(matches(target, module) for target in lora.targets)

    found, _ = split_low_rank(changes, params)
    products = {module: adapter for module, adapter in found.items() if learns(module, adapter)}
    others = {n: c for n, c in changes.items() if n.removesuffix(".weight") not in products}
    return products, others


def _check_ranks(
    what: str,
    name: str,
    products: Mapping[str, Adapter],
    own: Mapping[str, LoraConfig],
    added: Mapping[str, int],
) -> None:
    """Raises ConfigError for products of a network that have more ranks than learn."""
    key = "rank" if name == next(iter(own)) else "text_encoder_rank"
    for module, adapter in products.items():
        if module not in added and len(adapter.a) > own[name].rank:
            raise ConfigError(
                f"lora_start: {what} {len(adapter.a)} in the {name}'s {module}: lora.{key} must be "
                f"at least that, got {own[name].rank}"
            )


def _check(
    recipe: FinetuneRecipe,
    file: Any,
    products: Mapping[str, Mapping[str, Adapter]],
    others: Mapping[str, Changes],
) -> None:
    for name, adapters in products.items():
        if not adapters:
            raise ConfigError(
                f"lora_start: {file} has no low-rank product of the {name} in a layer that learns "
                "here (lora.targets), so that nothing of it would go on"
            )
    if recipe.lora_naming != "peft" and (kept := [n for c in others.values() for n in c]):
        raise ConfigError(
            f"lora_start: {file} changes {kept[0]} by more than what learns here, which is written "
            f"in PEFT's names: leave out lora_naming = {recipe.lora_naming!r}"
        )


def started(network: OpenNetwork, start: LoraStart) -> OpenNetwork:
    """A frozen network with all that stays of a file's changes in its weights."""
    changes = start.others.get(network.component, {})
    return merge(network, [(changes, 1.0)], dtype=np.float32)


def with_products(trained: Tree, scales: Tree, given: Tree) -> Tree:
    """A LoRA as `init_lora` begins it, with a file's products in its first ranks.

    `given`: these as `low_rank_tree` has them, of the same form. Its values become those of a LoRA
    with `scales`, so that nothing but the file's sum counts.
    """
    flat, own, theirs = flatten(trained), flatten(scales), flatten(given)
    for path, scale in theirs.items():
        if path[-1] != "scale":
            continue
        module, has = path[:-1], (scale != 0)[..., None, None]
        factor = (scale / jnp.where(scale != 0, own[path], 1.0))[..., None, None]
        a, b = theirs[*module, "a"], theirs[*module, "b"] * factor
        rank = a.shape[-1]
        first = flat[*module, "a"].at[..., :rank].set(a)
        flat[*module, "a"] = jnp.where(has, first, flat[*module, "a"])
        second = jnp.zeros_like(flat[*module, "b"]).at[..., :rank, :].set(b)
        flat[*module, "b"] = jnp.where(has, second, flat[*module, "b"])
    return unflatten(flat)


def given_trees(start: LoraStart, config: PipelineConfig, *, stacked: bool) -> dict[str, Tree]:
    """The products of a file by component, for `with_products`."""
    return {
        name: low_rank_tree(adapters, abstract_params(config.networks[name], stacked=stacked))
        for name, adapters in start.products.items()
        if adapters
    }


def kept_changes(
    recipe: FinetuneRecipe, base: PipelineConfig, start: LoraStart
) -> dict[str, dict[str, np.ndarray]]:
    """What is added to each parameter by all that stays of a file, by component and published
    name."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, changes in start.others.items():
        before = open_component(recipe.model_folder, name, base.networks[name])
        after = started(before, start)
        found[name] = {}
        for parameter in changes:
            old = before.tensors[parameter].read().astype(np.float32)
            new = after.tensors[parameter].read()
            if old.shape != new.shape:
                old = np.pad(old, ((0, 0), (0, new.shape[1] - old.shape[1])))
            found[name][parameter] = new - old
    return found
