"""What a fine-tuning run leaves behind: a LoRA file, or a whole pipeline folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp

from fluxjax.checkpoint.lora_file import write_lora
from fluxjax.checkpoint.pipeline_folder import save_params, write_config
from fluxjax.config import PipelineConfig
from fluxjax.models.lora import join_scales
from fluxjax.train.recipe import FinetuneRecipe, recipe_toml
from fluxjax.train.step import Tree

COPIED = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")


def export_lora(recipe: FinetuneRecipe, trained: Tree, scales: Tree) -> Path:
    """lora.safetensors with the recipe in its metadata; process 0 writes it."""
    path = recipe.folder / "lora.safetensors"
    tree = join_scales(_on_host(trained), _on_host(scales))
    if jax.process_index() == 0:
        write_lora(path, tree, recipe.lora, {"recipe": recipe_toml(recipe)})
    return path


def export_pipeline(recipe: FinetuneRecipe, config: PipelineConfig, params: Tree) -> Path:
    """A diffusers folder: the trained transformer beside copies of the frozen networks."""
    path, source = recipe.folder / "pipeline", recipe.model_folder
    params = _on_host(params)
    if jax.process_index() == 0:
        for name in COPIED:
            if (source / name).is_dir():
                shutil.copytree(source / name, path / name, dirs_exist_ok=True)
        write_config(path, config)
        for file in source.glob("*.json"):
            shutil.copyfile(file, path / file.name)
        save_params(path, "transformer", params, config.transformer, jnp.dtype(recipe.save_dtype))
    return path


def _on_host(tree: Tree) -> Tree:
    """numpy arrays of a tree that may lie on several hosts; all of them call this."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
