"""A pipeline of Open-Sora with small random weights, saved as a folder."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from random_checkpoints import random_tree

from fluxjax.checkpoint.pipeline_folder import save_params, write_config
from fluxjax.config import (
    CausalAutoencoderConfig,
    CLIPTextConfig,
    OpenSoraConfig,
    OpenSoraPipelineConfig,
    T5Config,
)

SMALL = OpenSoraPipelineConfig(
    transformer=OpenSoraConfig(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
    ),
    vae=CausalAutoencoderConfig(
        latent_channels=4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
    ),
    text_encoder=CLIPTextConfig(
        hidden_size=20,
        intermediate_size=40,
        projection_dim=20,
        num_hidden_layers=2,
        num_attention_heads=2,
    ),
    text_encoder_2=T5Config(d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3),
    max_sequence_length=16,
    steps=3,
    frames=5,
    width=48,
    height=32,
)


def save_open_sora(folder: Path, tokenizers: Path) -> Path:
    """Weights are wide enough that prompt, seed and what is given change the clip."""
    write_config(folder, SMALL)
    for seed, (component, part) in enumerate(SMALL.networks.items()):
        tree = random_tree(part, np.float32, seed)
        wide = {"transformer": 0.3, "vae": 0.2}.get(component, 0.3)
        scaled = jax.tree.map(lambda x, wide=wide: wide * x if x.ndim > 1 else 1 + 0.1 * x, tree)
        save_params(folder, component, scaled, part, np.float32)
    for name, source in (("tokenizer", "clip-vit-large-patch14"), ("tokenizer_2", "t5-v1_1-xxl")):
        shutil.copytree(tokenizers / source, folder / name)
    return folder


@pytest.fixture(scope="session")
def open_sora(shared: Path, tmp_path_factory) -> Path:
    """The folder; one for all modules that import this fixture."""
    folder = tmp_path_factory.getbasetemp() / "open_sora"
    return folder if folder.is_dir() else save_open_sora(folder, shared / "tokenizers")
