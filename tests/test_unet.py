"""The UNet against diffusers, layer by layer, and the published names at their real size."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from parameter_trees import parameter_count
from safetensors.numpy import load_file
from torch_reference import from_torch, relative_l2

from fluxjax.checkpoint import engine
from fluxjax.checkpoint.component_json import config_json, parse_config
from fluxjax.checkpoint.detect import detect_network, infer_config
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import Tensor, as_tensor
from fluxjax.config import (
    SD15_UNET,
    SD21_UNET,
    SDXL_REFINER_UNET,
    SDXL_UNET,
    ConfigError,
    UNetConfig,
)
from fluxjax.convert.__main__ import main
from fluxjax.diff.layers import captured, pair_layers, recorded
from fluxjax.networks.unet import UNET

TINY = UNetConfig(
    block_out_channels=(32, 64, 64),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1, 1),
    attention_head_dim=(4, 4, 4),
    cross_attention_dim=24,
    norm_num_groups=8,
)
TINIES = {
    "1.5": replace(TINY, in_channels=9, time_cond_proj_dim=17),
    "XL": replace(
        TINY,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 8),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=64 + 6 * 32,
    ),
}
REAL = {
    "sd15_unet": ("stable-diffusion-v1-5", SD15_UNET),
    "sd21_unet": ("stable-diffusion-2-1", SD21_UNET),
    "sdxl_unet": ("stable-diffusion-xl-base-1.0", SDXL_UNET),
    "sdxl_refiner_unet": ("stable-diffusion-xl-refiner-1.0", SDXL_REFINER_UNET),
}


def torch_unet(config):
    torch.manual_seed(0)
    values = {k: v for k, v in config_json(config).items() if not k.startswith("_")}
    model = UNet2DConditionModel.from_config({**values, "_class_name": "UNet2DConditionModel"})
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape) * (0.2 if tensor.ndim == 1 else 0.03))
    return model.eval()


def run_theirs(model, inputs, dtype=torch.float32):
    x = {k: torch.from_numpy(v) for k, v in inputs.items()}
    added = {k: x[k] for k in ("text_embeds", "time_ids") if k in x}
    with torch.no_grad():
        sample = (model if dtype == torch.float32 else model.to(dtype))(
            x["sample"].movedim(-1, 1).to(dtype),
            x["timestep"],
            x["encoder_hidden_states"].to(dtype),
            timestep_cond=x["timestep_cond"].to(dtype) if "timestep_cond" in x else None,
            added_cond_kwargs=added,
        ).sample
    return sample.float().movedim(1, -1).numpy()


def quickly(function, *arguments):
    """Compiling so many convolutions well takes longer than it saves."""
    options = {"xla_backend_optimization_level": "0"}
    return jax.jit(function).lower(*arguments).compile(options)(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1.5", "XL"])
def test_every_layer_equals_diffusers(name):
    """With sides of 12 x 18, whose third is odd."""
    config = TINIES[name]
    model, inputs = torch_unet(config), UNET.inputs(config)
    with recorded(model) as layers:
        expected = run_theirs(model, inputs)
    params, module = from_torch(model, config), UNET.build(config)
    capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
    got, state = quickly(lambda p, x: module.apply({"params": p}, **x, **capture), params, inputs)
    pairs = pair_layers(layers, captured(state["intermediates"]))
    assert len(pairs) > 80
    errors = {pair.name: relative_l2(pair.ours, pair.expected) for pair in pairs}
    assert not {layer: error for layer, error in errors.items() if not error < 1e-5}
    assert relative_l2(got, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", TINIES)
def test_bfloat16_is_as_good_as_torch(name):
    config = TINIES[name]
    model, inputs = torch_unet(config), UNET.inputs(config)
    params = from_torch(model, config)
    expected = run_theirs(model, inputs)
    theirs = relative_l2(run_theirs(model, inputs, torch.bfloat16), expected)
    module = UNET.build(config, dtype=jnp.bfloat16)
    ours = quickly(lambda p, x: module.apply({"params": p}, **x), params, inputs)
    assert relative_l2(ours.astype(jnp.float32), expected) <= 1.5 * theirs


def lazy(shapes):
    def read(start, stop):
        raise AssertionError("nothing is read")

    return {n: Tensor(tuple(s), np.dtype(np.float32), read) for n, s in shapes.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_published_names_and_shapes(shared, name):
    folder, config = REAL[name]
    published = json.loads((shared / f"checkpoints/{name}.json").read_text())
    path = shared / f"checkpoints/{folder}/unet/config.json"
    assert parse_config(UNetConfig, json.loads(path.read_text()), path) == config
    template = abstract_params(config)
    shapes = {n: list(leaf.shape) for n, leaf in engine.published_leaves(template).items()}
    assert shapes == published["tensors"]
    assert parameter_count(template) == published["parameters"]
    expected = {n: tuple(s) for n, s in shapes.items()}
    network, dialect = detect_network(expected)
    assert (network.component, dialect.name) == ("unet", "published")
    assert infer_config(network, dialect, expected) == config
    # Through the original names and back.
    table = UNET.dialect("bfl").table(config)
    theirs = engine.from_published(lazy(shapes), table)
    assert len(theirs) == len(shapes)
    back = engine.to_published(theirs, table, expected)
    assert {n: t.shape for n, t in back.items()} == expected
    network, dialect = detect_network({n: t.shape for n, t in theirs.items()})
    assert dialect.name == "bfl"
    assert infer_config(network, dialect, {n: t.shape for n, t in theirs.items()}) == config


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ldm_sd15", "ldm_sdxl_base"])
def test_the_original_files_names(shared, name):
    published = json.loads((shared / f"checkpoints/{name}.json").read_text())["tensors"]
    prefix = "model.diffusion_model."
    original = {n[len(prefix) :]: s for n, s in published.items() if n.startswith(prefix)}
    config = {"ldm_sd15": SD15_UNET, "ldm_sdxl_base": SDXL_UNET}[name]
    leaves = engine.published_leaves(abstract_params(config))
    shapes = {n: leaf.shape for n, leaf in leaves.items()}
    table = UNET.dialect("bfl").table(config)
    reference = engine.to_published(lazy(original), table, shapes)
    assert reference.keys() == shapes.keys()
    back = engine.from_published(reference, table)
    assert {n: list(t.shape) for n, t in back.items()} == original


def test_values_land_where_diffusers_puts_them():
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = TINIES["XL"]
    model = torch_unet(config)
    ours = {n: as_tensor(t.numpy()) for n, t in model.state_dict().items()}
    theirs = engine.from_published(ours, UNET.dialect("bfl").table(config))
    original = {f"model.diffusion_model.{n}": torch.from_numpy(t.read()) for n, t in theirs.items()}
    converted = convert_ldm_unet_checkpoint(original, dict(model.config))
    assert converted.keys() == ours.keys()
    for name, tensor in converted.items():
        np.testing.assert_array_equal(tensor.numpy(), ours[name].read(), name)


def test_a_folder_is_converted_and_back_without_a_bit_lost(tmp_path):
    torch_unet(TINIES["XL"]).save_pretrained(tmp_path / "unet")
    main([str(tmp_path / "unet"), str(tmp_path / "original"), "--to", "bfl"])
    names = load_file(tmp_path / "original" / "unet.safetensors").keys()
    assert "input_blocks.0.0.weight" in names and "label_emb.0.0.weight" in names
    main([str(tmp_path / "original"), str(tmp_path / "back"), "--to", "diffusers"])
    file = "diffusion_pytorch_model.safetensors"
    expected, got = (load_file(tmp_path / name / file) for name in ("unet", "back"))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(got[name], tensor, name)
    assert UNet2DConditionModel.from_pretrained(tmp_path / "back").config.block_out_channels


@pytest.mark.parametrize(("version", "rows"), [("0.8.1", 64), ("0.9.0.dev0", 32), (None, 32)])
def test_small_sizes_of_old_files_are_raised_as_diffusers_does(tmp_path, version, rows):
    values = {**config_json(SD15_UNET), "sample_size": 32, "_diffusers_version": version}
    assert parse_config(UNetConfig, values, tmp_path / "config.json").sample_size == rows


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type='UNetMidBlock2D' is not supported"),
        ({"attention_head_dim": [3, 3, 3, 3]}, "3 do not divide 320 channels"),
        ({"block_out_channels": [320, 640]}, "has 4 entries where block_out_channels has 2"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types"),
        ({"time_cond_proj_dim": 2}, "time_cond_proj_dim must be from 4"),
    ],
)
def test_other_unets_are_refused(tmp_path, changes, words):
    values = {**config_json(SD15_UNET), **changes}
    with pytest.raises(Exception, match=words) as error:
        parse_config(UNetConfig, values, tmp_path / "config.json")
    assert isinstance(error.value, ConfigError) or "down_block_types" in words
