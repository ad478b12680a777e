"""What a fine-tuning run leaves behind: a LoRA file, or a whole pipeline folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.atomic_write import whole_or_nothing
from fluxjax.checkpoint.lora_file import write_lora
from fluxjax.checkpoint.pipeline_folder import save_params, write_config
from fluxjax.config import PipelineConfig
from fluxjax.models.lora import join_scales
from fluxjax.parallel.mesh import gathered
from fluxjax.train.recipe import FinetuneRecipe, recipe_toml
from fluxjax.train.step import Tree

COPIED = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")


def export_lora(recipe: FinetuneRecipe, trained: Tree, scales: Tree) -> Path:
    """lora.safetensors with the recipe in its metadata; process 0 writes it."""
    path = recipe.folder / "lora.safetensors"
    tree = join_scales(_on_first_host(trained), _on_first_host(scales))
    if jax.process_index() == 0:
        write_lora(path, tree, recipe.lora, {"recipe": recipe_toml(recipe)})
    return path


def export_pipeline(recipe: FinetuneRecipe, config: PipelineConfig, params: Tree) -> Path:
    """A diffusers folder: the trained transformer beside copies of the frozen networks.

    Process 0 writes it; it appears whole or not at all.
    """
    path, source = recipe.folder / "pipeline", recipe.model_folder
    params = _on_first_host(params, jnp.dtype(recipe.save_dtype))
    if jax.process_index() == 0:
        with whole_or_nothing(path) as part:
            for name in COPIED:
                if (source / name).is_dir():
                    shutil.copytree(source / name, part / name)
            write_config(part, config)
            for file in source.glob("*.json"):
                shutil.copyfile(file, part / file.name)
            save_params(part, "transformer", params, config.transformer, None)
    return path


def _on_first_host(tree: Tree, dtype: Any = None) -> Tree:
    """numpy arrays on process 0 of a tree that may lie on several; all of them call this.

    One leaf after the other, in `dtype` already: no other host needs room for more than one.
    """

    def fetch(leaf: Any) -> np.ndarray | None:
        array = gathered(leaf if dtype is None else leaf.astype(dtype))
        return array if jax.process_index() == 0 else None

    return jax.tree.map(fetch, tree)
