"""Stable Diffusion 3's transformer against diffusers, layer by layer, and the published names."""

import copy
import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from parameter_trees import parameter_count
from random_checkpoints import bfl_arrays
from safetensors.numpy import load_file, save_file
from torch_reference import from_torch, relative_l2

from fluxjax.checkpoint import engine
from fluxjax.checkpoint.component_json import config_json, parse_config
from fluxjax.checkpoint.detect import detect_network, infer_config
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import Tensor, as_tensor
from fluxjax.config import (
    SD3_MEDIUM,
    SD35_LARGE,
    SD35_MEDIUM,
    AutoencoderConfig,
    ConfigError,
    SD3Config,
)
from fluxjax.convert.__main__ import main
from fluxjax.diff.layers import captured, pair_layers, recorded
from fluxjax.models.stacking import stack_layers
from fluxjax.networks.sd3 import SD3
from fluxjax.parallel.apply import apply_on
from fluxjax.parallel.mesh import make_mesh
from fluxjax.parallel.rules import param_shardings

PLAIN = SD3Config(
    sample_size=16,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    pos_embed_max_size=12,
)
TINIES = {
    "3": PLAIN,
    "3.5": SD3Config(
        **{**vars(PLAIN), "num_layers": 5, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
    ),
}


@cache
def torch_model(config):
    torch.manual_seed(0)
    values = {k: v for k, v in config_json(config).items() if not k.startswith("_")}
    model = SD3Transformer2DModel(**values).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.2 if parameter.ndim == 1 else 0.05))
        # Trained models' tables are not what a new one computes.
        model.get_buffer("pos_embed.pos_embed").mul_(0.7)
    return model


def run_theirs(config, dtype=torch.float32, **options):
    x = {k: torch.from_numpy(v) for k, v in SD3.inputs(config).items()}
    x = {k: v if k == "timestep" else v.to(dtype) for k, v in x.items()}
    x["hidden_states"] = x["hidden_states"].movedim(-1, 1)
    model = torch_model(config)
    model = model if dtype == torch.float32 else copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        sample = model(**x, **options).sample
    return sample.float().movedim(1, -1).numpy()


def quickly(function, *arguments):
    options: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
    return jax.jit(function).lower(*arguments).compile(options)(*arguments)


def scanned(config):
    return stack_layers(from_torch(torch_model(config), config))


def assert_equal(pairs, least):
    assert len(pairs) > least
    errors = {pair.name: relative_l2(pair.ours, pair.expected) for pair in pairs}
    assert not {layer: error for layer, error in errors.items() if not error < 1e-5}


@pytest.mark.parametrize("name", [pytest.param("3", marks=pytest.mark.slow), "3.5"])
def test_every_layer_equals_diffusers(name):
    config = TINIES[name]
    with recorded(torch_model(config)) as layers:
        expected = run_theirs(config)
    params, module = from_torch(torch_model(config), config), SD3.build(config)
    capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
    got, state = quickly(
        lambda p, x: module.apply({"params": p}, **x, **capture), params, SD3.inputs(config)
    )
    assert_equal(pair_layers(layers, captured(state["intermediates"])), 20 * config.num_layers)
    assert relative_l2(got, expected) < 1e-5


@pytest.mark.slow
def test_a_run_taken_apart_with_scanned_blocks_of_which_some_are_left_out():
    """Dual blocks, others and the last are scanned apart; of two rows each leaves out others."""
    config = TINIES["3.5"]
    params = scanned(config)
    assert {name for name in params if name.startswith("transformer_blocks")} == {
        "transformer_blocks_0_to_1",
        "transformer_blocks_2_to_3",
        "transformer_blocks_4",
    }
    template = abstract_params(config, stacked=True)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, template)
    module, left_out = SD3.build(config, scan_layers=True), np.zeros((config.num_layers, 2), bool)
    left_out[[1, 3], 1] = True

    def run(p, x):
        def method(name, *args):
            return module.apply({"params": p}, *args, method=name)

        text = method("embed_text", x["encoder_hidden_states"])
        each = method("step_modulations", x["timestep"], x["pooled_projections"])
        patches = method("patchify", x["hidden_states"])
        size = x["hidden_states"].shape[1:3]

        def step(_, modulations):
            given = patches, method("positions", *size), text, modulations, jnp.asarray(left_out)
            return None, method("unpatchify", method("denoise", *given), *size)

        return jax.lax.scan(step, None, each)[1]

    got = quickly(run, params, SD3.inputs(config))
    expected = run_theirs(config), run_theirs(config, skip_layers=[1, 3])
    for row in range(2):  # at its own step
        assert relative_l2(got[row, row], expected[row][row]) < 1e-5
    assert relative_l2(expected[0][1], expected[1][1]) > 0.1


@pytest.mark.slow
def test_on_a_mesh():
    """Tokens split: attention of the picture alone, too, sees all of them."""
    config, x = TINIES["3.5"], SD3.inputs(TINIES["3.5"])
    mesh, module = make_mesh("fsdp=2,tensor=2,sequence=2"), SD3.build(config, scan_layers=True)
    params = jax.device_put(scanned(config), param_shardings(config, scanned(config), mesh))
    got = quickly(lambda p, x: apply_on(mesh, module, {"params": p}, **x), params, x)
    assert relative_l2(got, run_theirs(config)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", TINIES)
def test_bfloat16_is_as_good_as_torch(name):
    config = TINIES[name]
    expected, params = run_theirs(config), scanned(config)
    theirs = relative_l2(run_theirs(config, torch.bfloat16), expected)
    module = SD3.build(config, scan_layers=True, dtype=jnp.bfloat16)
    ours = quickly(lambda p, x: module.apply({"params": p}, **x), params, SD3.inputs(config))
    assert relative_l2(ours.astype(jnp.float32), expected) <= 1.5 * theirs


REAL = {
    "sd3_medium": ("stable-diffusion-3-medium-diffusers", SD3_MEDIUM, 2_028_328_000),
    "sd35_medium": ("stable-diffusion-3.5-medium", SD35_MEDIUM, 2_243_171_520),
    "sd35_large": ("stable-diffusion-3.5-large", SD35_LARGE, 8_056_627_520),
}


def lazy(shapes):
    def read(start, stop):
        raise AssertionError("nothing is read")

    return {n: Tensor(tuple(s), np.dtype(np.float32), read) for n, s in shapes.items()}


@pytest.mark.parametrize("name", REAL)
def test_published_names_and_shapes(shared, name):
    """diffusers' and Stability's names map onto each other and onto our tree, each once."""
    folder, config, parameters = REAL[name]
    published = json.loads((shared / f"checkpoints/{name}.json").read_text())
    path = shared / f"checkpoints/{folder}/transformer/config.json"
    assert parse_config(SD3Config, json.loads(path.read_text()), path) == config
    shapes = {n: tuple(s) for n, s in published["tensors"].items()}
    for stacked in (False, True):
        template = abstract_params(config, stacked=stacked)
        leaves = engine.published_leaves(template)
        assert {n: leaf.shape for n, leaf in leaves.items()} == shapes
        assert parameter_count(template) == published["parameters"]
    assert parameter_count(template) - np.prod(shapes["pos_embed.pos_embed"]) == parameters
    assert inferred(shapes) == ("published", config)
    original = json.loads((shared / f"checkpoints/ldm_{name}.json").read_text())["tensors"]
    prefix = "model.diffusion_model."
    theirs = {n[len(prefix) :]: tuple(s) for n, s in original.items() if n.startswith(prefix)}
    assert inferred(theirs) == ("bfl", config)
    table = SD3.dialect("bfl").table(config)
    found = engine.to_published(lazy(theirs), table, shapes)
    back = engine.from_published(found, table)
    assert {n: t.shape for n, t in back.items()} == theirs


def inferred(shapes):
    network, dialect = detect_network(shapes)
    assert network is SD3
    return dialect.name, infer_config(network, dialect, shapes)


def test_values_land_where_diffusers_puts_them():
    config = TINIES["3.5"]
    ours = {n: as_tensor(t.numpy()) for n, t in torch_model(config).state_dict().items()}
    theirs = engine.from_published(ours, SD3.dialect("bfl").table(config))
    original = {n: torch.from_numpy(t.read()) for n, t in theirs.items()}
    converted = convert_sd3_transformer_checkpoint_to_diffusers(original)
    assert converted.keys() == ours.keys()
    for name, tensor in converted.items():
        np.testing.assert_array_equal(tensor.numpy(), ours[name].read(), name)


@pytest.mark.slow
def test_a_single_file_is_converted_and_back_without_a_bit_lost(tmp_path):
    """Stability's file: the transformer, and the autoencoder, whose scale the former tells."""
    config, vae = TINIES["3.5"], AutoencoderConfig(block_out_channels=(32, 32))
    arrays = {f"model.diffusion_model.{n}": a for n, a in bfl_arrays(config).items()}
    arrays |= {f"first_stage_model.{n}": a for n, a in bfl_arrays(vae).items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(arrays, tmp_path / "sd3.safetensors")
    main([str(tmp_path / "sd3.safetensors"), str(tmp_path / "folders"), "--to", "diffusers"])
    found = json.loads((tmp_path / "folders/vae/config.json").read_text())
    assert (found["scaling_factor"], found["shift_factor"]) == (1.5305, 0.0609)
    model = SD3Transformer2DModel.from_pretrained(tmp_path / "folders/transformer")
    assert model.config["dual_attention_layers"] == [0, 1]
    main([str(tmp_path / "folders"), str(tmp_path / "back"), "--to", "bfl"])
    files = {"model.diffusion_model": "sd3_transformer", "first_stage_model": "ae"}
    for prefix, name in files.items():
        for key, array in load_file(tmp_path / f"back/{name}.safetensors").items():
            assert array.tobytes() == arrays.pop(f"{prefix}.{key}").tobytes(), key
    assert not arrays
    # By itself the autoencoder does not tell whose it is.
    save_file(load_file(tmp_path / "back/ae.safetensors"), tmp_path / "vae.safetensors")
    bare = [str(tmp_path / "vae.safetensors"), str(tmp_path / "bare")]
    with pytest.raises(ConfigError, match="say whose it is with --family"):
        main(bare)
    main([*bare, "--family", "sd3"])
    assert json.loads((tmp_path / "bare/config.json").read_text())["scaling_factor"] == 1.5305


def test_adapters_are_merged_as_diffusers_fuses_them(tmp_path):
    """Of q, k and v in one, as kohya names them; of the rest in diffusers' names. Stability's order
    of the last norm is turned, too."""
    config, random = TINIES["3.5"], np.random.default_rng(0)
    width = config.inner_dim

    def pair(name, inputs, outputs):
        down, up = (random.standard_normal(s, np.float32) for s in ((3, inputs), (outputs, 3)))
        return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}

    fused = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    last = "lora_unet_joint_blocks_4_context_block_adaLN_modulation_1"
    arrays = pair(fused, width, 3 * width) | pair(last, width, 2 * width)
    save_file(arrays, tmp_path / "kohya.safetensors")
    names = ("transformer_blocks.2.ff_context.net.2", "transformer_blocks.1.attn2.to_out.0")
    inputs = (4 * width, width)
    peft = {}
    for name, size in zip(names, inputs, strict=True):
        for key, array in pair(name, size, width).items():
            peft[f"transformer.{key.replace('down', 'A').replace('up', 'B')}"] = array
    save_file(peft, tmp_path / "peft.safetensors")
    torch_model(config).save_pretrained(tmp_path / "base")
    files = [f"--lora={tmp_path / name}.safetensors" for name in ("kohya", "peft")]
    main([str(tmp_path / "base"), str(tmp_path / "merged"), "--to", "diffusers", *files])
    got = load_file(tmp_path / "merged/diffusion_pytorch_model.safetensors")

    model = copy.deepcopy(torch_model(config))
    model.load_lora_adapter({k: torch.from_numpy(v) for k, v in peft.items()})
    model.fuse_lora()
    expected = {k.replace(".base_layer", ""): v.numpy() for k, v in model.state_dict().items()}
    block = "transformer_blocks.0.attn.to_"
    change = arrays[f"{fused}.lora_up.weight"] @ arrays[f"{fused}.lora_down.weight"]
    for name, rows in zip("qkv", np.split(change, 3), strict=True):
        expected[f"{block}{name}.weight"] = expected[f"{block}{name}.weight"] + rows
    change = arrays[f"{last}.lora_up.weight"] @ arrays[f"{last}.lora_down.weight"]
    norm = "transformer_blocks.4.norm1_context.linear.weight"
    expected[norm] = expected[norm] + np.roll(change, width, axis=0)
    for name, array in got.items():
        np.testing.assert_allclose(array, expected[name], atol=2e-6 * np.abs(array).max())
