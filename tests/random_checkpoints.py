"""Small checkpoints with random bits in every form that people have, made without any network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
from parameter_trees import to_theirs

from fluxjax.checkpoint import engine
from fluxjax.checkpoint.pipeline_folder import save_params, write_config
from fluxjax.checkpoint.safetensors_file import read_safetensors
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import (
    AutoencoderConfig,
    CLIPTextConfig,
    FluxConfig,
    FluxPipelineConfig,
    T5Config,
)
from fluxjax.networks import network_of

# Sizes that shapes alone tell: heads of 128, CLIP heads of 64, 32 groups.
SMALL = FluxPipelineConfig(
    transformer=FluxConfig(
        num_layers=2,
        num_single_layers=3,
        num_attention_heads=1,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        mlp_ratio=2.0,
    ),
    vae=AutoencoderConfig(block_out_channels=(32, 64), layers_per_block=1),
    text_encoder=CLIPTextConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=9,
    ),
    text_encoder_2=T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
)
# As diffusers can build it: its MLP ratio is always 4.
DIFFUSERS = replace(SMALL, transformer=replace(SMALL.transformer, mlp_ratio=4.0))

Arrays = dict[str, np.ndarray]


def random_tree(config, dtype, seed: int = 0) -> dict:
    """Parameters of a network: normal numbers, so that casts and scales are tried too."""
    rng = np.random.default_rng(seed)
    flat = engine.flatten(abstract_params(config))
    return engine.unflatten(
        {path: rng.standard_normal(leaf.shape).astype(dtype) for path, leaf in flat.items()}
    )


def pipeline_folder(
    folder: Path, config: FluxPipelineConfig = SMALL, dtype=ml_dtypes.bfloat16
) -> Path:
    write_config(folder, config)
    for seed, (component, part) in enumerate(config.networks.items()):
        save_params(folder, component, random_tree(part, dtype, seed), part, None)
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir()
        (folder / name / "tokenizer_config.json").write_text("{}")
    return folder


def bfl_arrays(config, dtype=ml_dtypes.bfloat16) -> Arrays:
    """A transformer or autoencoder under BFL's names."""
    table = network_of(config).dialect("bfl").table(config)
    theirs = to_theirs(random_tree(config, dtype), table)
    return {name: tensor.read() for name, tensor in theirs.items()}


def hf_arrays(config, dtype=np.float16) -> Arrays:
    reference = engine.from_tree(random_tree(config, dtype))
    return {name: tensor.read() for name, tensor in reference.items()}


def scaled_fp8(arrays: Arrays, newer: bool = False) -> Arrays:
    """ComfyUI's scaled fp8 of every matrix; `newer` with the later names."""
    weight, given = ("weight_scale", "input_scale") if newer else ("scale_weight", "scale_input")
    out: Arrays = {"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)} if not newer else {}
    for name, array in arrays.items():
        module = name.removesuffix(".weight")
        if array.ndim != 2 or module == name:
            out[name] = array
            continue
        scale = np.float32(np.abs(array.astype(np.float32)).max() / 448)
        out[name] = (array.astype(np.float32) / scale).astype(ml_dtypes.float8_e4m3fn)
        out[f"{module}.{weight}"] = np.asarray(scale)
        out[f"{module}.{given}"] = np.asarray(np.float32(1.5))
    return out


def all_in_one(transformer: Arrays, vae: Arrays, clip: Arrays, t5: Arrays) -> Arrays:
    """ComfyUI's one file for all."""
    prefixed = (
        ("model.diffusion_model.", transformer),
        ("vae.", vae),
        ("text_encoders.clip_l.transformer.", clip),
        ("text_encoders.t5xxl.transformer.", t5),
    )
    return {prefix + name: array for prefix, arrays in prefixed for name, array in arrays.items()}


def read_arrays(*paths: Path) -> Arrays:
    """Every tensor of the files, or of all safetensors below a folder (names then by folder)."""
    arrays: Arrays = {}
    for path in paths:
        for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
            folder = file.parent.relative_to(path) if path.is_dir() else Path()
            for name, tensor in read_safetensors(file)[0].items():
                arrays[(folder / name).as_posix()] = tensor.read()
    return arrays


def assert_same_bits(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape), name
        assert ours[name].tobytes() == array.tobytes(), name
