"""What a fine-tuning run leaves behind: a LoRA file, or a whole pipeline folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.atomic_write import whole_or_nothing
from fluxjax.checkpoint.component_json import write_json
from fluxjax.checkpoint.lora.writer import write_lora
from fluxjax.checkpoint.pipeline_folder import (
    DEFAULTS_KEY,
    load_params,
    read_config,
    sampling_defaults,
    save_params,
    write_config,
)
from fluxjax.checkpoint.sharded import name_plainly
from fluxjax.checkpoint.source import open_component
from fluxjax.checkpoint.training_state import read_state
from fluxjax.config import ConfigError, PipelineConfig
from fluxjax.json_input import read_json
from fluxjax.models.lora import join_scales
from fluxjax.models.names import flatten, is_stacked, unflatten
from fluxjax.networks import network_of
from fluxjax.parallel.mesh import gathered
from fluxjax.train.loop import CHECKPOINTS
from fluxjax.train.lora_start import kept_changes, read_start, started
from fluxjax.train.recipe import FinetuneRecipe, read_recipe, recipe_toml, without_places
from fluxjax.train.step import Tree
from fluxjax.train.task import learnt
from fluxjax.train.trained_networks import apart, initial_loras
from fluxjax.train.wider_input import added_inputs


def export(
    recipe: FinetuneRecipe,
    config: PipelineConfig,
    trained: Tree,
    frozen: Mapping[str, Tree],
    *,
    step: int | None = None,
    out: Path | None = None,
) -> Path:
    """A LoRA file with the recipe in its metadata, a ControlNet's folder, or a pipeline's: the
    trained networks beside copies of the frozen ones; folders as diffusers has them.
    `frozen` as of `trained_networks.TrainedNetworks`.

    All processes call it; the first one writes `out`, by default in the run's folder and with the
    step in its name, which is none for the end of the run. It appears whole or not at all.
    """
    lora = recipe.method == "lora"
    made = {"lora": "lora", "full": "pipeline", "controlnet": "controlnet"}[recipe.method]
    name = made + ("" if step is None else f"_{step:07d}")
    path = out or recipe.folder / (f"{name}.safetensors" if lora else name)
    if lora:
        trained, scales = _on_first_host(trained), _on_first_host(frozen["scales"])
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {}
            if recipe.record:
                metadata["recipe"] = recipe_toml(without_places(recipe))
            base = read_config(recipe.model_folder)
            start = read_start(recipe, base, config)
            own = sampling_defaults(config) if _has_more_inputs(base, config) else {}
            if defaults := own | start.defaults:
                metadata[DEFAULTS_KEY] = json.dumps(defaults)
            trees = {name: join_scales(trained[name], scales[name]) for name in trained}
            naming, model = recipe.lora_naming, config.networks
            kept = kept_changes(recipe, base, start)
            write_lora(path, trees, recipe.lora, metadata, naming=naming, model=model, changes=kept)
        return path
    learnt_ones = trained if recipe.by_component else {config.denoiser: trained}
    rest, drawing = flatten(frozen.get("rest", {})), flatten(learnt_ones[config.denoiser])
    whole = {**learnt_ones, config.denoiser: unflatten({**rest, **drawing})}
    params = _on_first_host(whole, jnp.dtype(recipe.save_dtype))
    if jax.process_index() == 0:
        with whole_or_nothing(path) as part:
            if config.controlnets:
                net = params[config.denoiser]
                save_params(part.parent, part.name, net, config.controlnets[0], None)
            else:
                _write_pipeline(part, recipe.model_folder, config, params)
    return path


def export_run(
    folder: Path, *, step: int | None = None, model: str | None = None, out: Path | None = None
) -> Path:
    """The result of a run as of its newest checkpoint, or of that of `step`; it may still go on.

    `model` says where the run's model is now, if it has moved. Raises ConfigError, OSError and
    ValueError.
    """
    recipe = read_recipe(folder / "recipe.toml")
    if not isinstance(recipe, FinetuneRecipe):
        raise ConfigError(f"{folder} is no fine-tuning run: it trains the embedded model")
    recipe = dataclasses.replace(recipe, folder=folder, model=model or recipe.model)
    base = read_config(recipe.model_folder)
    config, _ = learnt(recipe, base)
    before, after = (one.networks[one.denoiser] for one in (base, config))
    part = "ema" if recipe.decay > 0 else "params"
    found, trained = read_state(folder / CHECKPOINTS, part, step)
    stacked = any(map(is_stacked, flatten(trained)))
    frozen: dict[str, Tree] = {}
    if recipe.method == "lora":
        start = read_start(recipe, base, config)
        network = open_component(recipe.model_folder, config.denoiser, before)
        added = added_inputs(started(network, start).config, after)
        of = partial(initial_loras, recipe.lora, config, recipe.seed, stacked=stacked, added=added)
        frozen["scales"] = jax.jit(lambda: of()[1])()
    elif recipe.modules or (recipe.method == "full" and network_of(after).unlearnt):
        name, kind = config.denoiser, jnp.float32
        params = load_params(recipe.model_folder, name, after, stacked=stacked, dtype=kind)
        frozen["rest"] = apart(params, recipe.modules, network_of(after).unlearnt)[1]
    return export(recipe, config, trained, frozen, step=found, out=out)


def _has_more_inputs(base: PipelineConfig, config: PipelineConfig) -> bool:
    """Than the model that training began with."""
    return bool(added_inputs(base.networks[base.denoiser], config.networks[config.denoiser]))


def _write_pipeline(
    folder: Path, source: Path, config: PipelineConfig, params: Mapping[str, Tree]
) -> None:
    """With the networks of `params`, by component; the others are the source's."""
    write_config(folder, config)
    # Those of the source, unless the model has become one of another task.
    base = read_config(source)
    other = _has_more_inputs(base, config)
    for file in source.glob("*.json"):
        if not (other and (folder / file.name).exists()):
            shutil.copyfile(file, folder / file.name)
    own_noise = config.scheduler != base.scheduler
    for name in read_json(source / "model_index.json"):
        kept = name in params or (name == "scheduler" and own_noise)
        if (source / name).is_dir() and not kept:
            shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
            if name in config.networks:
                name_plainly(folder / name)
    for name, tree in params.items():
        save_params(folder, name, tree, config.networks[name], None)
    index = read_json(folder / "model_index.json")
    listed = {name for name, value in index.items() if isinstance(value, list) and any(value)}
    # A safety checker, of no use here, is not downloaded from a hub.
    lacking = listed - {path.name for path in folder.iterdir()}
    if lacking:
        write_json(folder / "model_index.json", index | {name: [None, None] for name in lacking})


def _on_first_host(tree: Tree, dtype: Any = None) -> Tree:
    """numpy arrays on process 0 of a tree that may lie on several; all of them call this.

    One leaf after the other, in `dtype` already: no other host needs room for more than one.
    """

    def fetch(leaf: Any) -> np.ndarray | None:
        leaf = leaf if dtype is None else leaf.astype(dtype)
        array = leaf if isinstance(leaf, np.ndarray) else gathered(leaf)
        return array if jax.process_index() == 0 else None

    return jax.tree.map(fetch, tree)
