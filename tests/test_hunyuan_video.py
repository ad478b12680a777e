"""HunyuanVideo's transformer against diffusers, layer by layer, and its names at real size."""

import copy
import inspect
import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from comfy_names import comfy_transformer
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.loaders import single_file_utils
from parameter_trees import parameter_count
from random_checkpoints import random_tree
from torch_reference import from_torch, relative_l2

from fluxjax.checkpoint import engine
from fluxjax.checkpoint.component_json import config_json, parse_config
from fluxjax.checkpoint.detect import detect_network, infer_config
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import Tensor
from fluxjax.config import (
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_CONCAT,
    HUNYUAN_VIDEO_REPLACE,
    ConfigError,
    HunyuanVideoConfig,
)
from fluxjax.diff.golden import check_golden
from fluxjax.diff.layers import captured, pair_layers, recorded
from fluxjax.models.stacking import stack_layers
from fluxjax.networks.hunyuan_video import HUNYUAN_VIDEO as NETWORK
from fluxjax.parallel.apply import apply_on
from fluxjax.parallel.mesh import make_mesh
from fluxjax.parallel.rules import param_shardings

TINY = HunyuanVideoConfig(
    in_channels=16,
    out_channels=16,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=4,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    axes_dims_rope=(4, 6, 6),
)
REPLACE = replace(TINY, image_condition_type="token_replace")
CONCAT = replace(TINY, in_channels=36, guidance_embeds=False, image_condition_type="latent_concat")


@cache
def torch_model(config):
    torch.manual_seed(0)
    values = {k: v for k, v in config_json(config).items() if not k.startswith("_")}
    model = HunyuanVideoTransformer3DModel(**values).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.2 if parameter.ndim == 1 else 0.05))
    return model


def padded(config):
    inputs = NETWORK.inputs(config)
    inputs["encoder_attention_mask"][1, 9:] = 0
    return inputs


def run_theirs(config, inputs, dtype=torch.float32):
    x = {k: torch.from_numpy(v) for k, v in inputs.items()}
    exact = ("timestep", "encoder_attention_mask", "guidance")
    x = {k: v if k in exact else v.to(dtype) for k, v in x.items()}
    if "guidance" in x:
        x["guidance"] = 1000 * x["guidance"]
    model = torch_model(config)
    model = model if dtype == torch.float32 else copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        return model(**x).sample.float().numpy()


def quickly(function, *arguments):
    options: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
    return jax.jit(function).lower(*arguments).compile(options)(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("config", [REPLACE, CONCAT], ids=["replace", "concat"])
def test_every_layer_equals_diffusers(config):
    inputs = NETWORK.inputs(config)
    with recorded(torch_model(config)) as layers:
        expected = run_theirs(config, inputs)
    params, module = from_torch(torch_model(config), config), NETWORK.build(config)
    capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
    got, state = quickly(lambda p, x: module.apply({"params": p}, **x, **capture), params, inputs)
    pairs = pair_layers(layers, captured(state["intermediates"]))
    assert len(pairs) > 70, len(pairs)
    errors = {pair.name: relative_l2(pair.ours, pair.expected) for pair in pairs}
    assert not {layer: error for layer, error in errors.items() if not error < 1e-5}
    assert relative_l2(got, expected) < 1e-5


@cache
def scanned():
    return stack_layers(from_torch(torch_model(REPLACE), REPLACE))


@pytest.mark.slow
def test_padded_text_of_scanned_blocks():
    """What padding holds reaches nothing."""
    inputs, module = padded(REPLACE), NETWORK.build(REPLACE, scan_layers=True)
    expected = run_theirs(REPLACE, inputs)
    run = jax.jit(lambda p, x: module.apply({"params": p}, **x))
    assert relative_l2(run(scanned(), inputs), expected) < 1e-5
    inputs["encoder_hidden_states"][1, 9:] = 100.0
    assert relative_l2(run(scanned(), inputs), expected) < 1e-5


@pytest.mark.slow
def test_a_run_taken_apart():
    """Modulations of all steps at once, tokens of a first frame among them; text at each step."""
    inputs, module = padded(REPLACE), NETWORK.build(REPLACE, scan_layers=True)
    size = inputs["hidden_states"].shape[2:]
    lengths = jnp.asarray(inputs["encoder_attention_mask"].sum(axis=1), jnp.int32)
    times = jnp.array([750.0, 500.0, 31.0])

    def run(p, x):
        def method(name, *args):
            return module.apply({"params": p}, *args, method=name)

        tokens = method("pack", x["hidden_states"])
        each = method("step_modulations", times, x["pooled_projections"], x["guidance"])
        rope, replaced = method("positions", *size, 12), method("replaced", *size)

        def step(_, inputs):
            t, modulations = inputs
            text = method("embed_text", x["encoder_hidden_states"], jnp.full(2, t), lengths)
            lasting = tokens.shape[1] + lengths
            out = method("denoise", tokens, text, modulations, rope, lasting, replaced)
            return None, method("unpack", out, *size[1:])

        return jax.lax.scan(step, None, (times, each))[1]

    got = quickly(run, scanned(), inputs)
    for step, t in enumerate(times):
        expected = run_theirs(REPLACE, inputs | {"timestep": np.full(2, t, np.float32)})
        assert relative_l2(got[step], expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ulysses", "ulysses=2"])
def test_on_a_mesh(kind):
    """18 tokens of video, of which 6 are replaced, and 12 of text, padded, over devices; in the
    second case a ring of pairs."""
    inputs, module = padded(REPLACE), NETWORK.build(REPLACE, scan_layers=True)
    devices = "fsdp=2,tensor=2,sequence=2" if kind == "ulysses" else "sequence=4,tensor=2"
    mesh = make_mesh(devices)
    params = jax.device_put(scanned(), param_shardings(REPLACE, scanned(), mesh))
    got = quickly(
        lambda p, x: apply_on(mesh, module, {"params": p}, **x, sequence=kind), params, inputs
    )
    assert relative_l2(got, run_theirs(REPLACE, inputs)) < 1e-5


@pytest.mark.slow
def test_bfloat16_is_as_good_as_torch():
    inputs = padded(REPLACE)
    expected = run_theirs(REPLACE, inputs)
    theirs = relative_l2(run_theirs(REPLACE, inputs, torch.bfloat16), expected)
    module = NETWORK.build(REPLACE, scan_layers=True, dtype=jnp.bfloat16)
    ours = quickly(lambda p, x: module.apply({"params": p}, **x), scanned(), inputs)
    assert relative_l2(ours.astype(jnp.float32), expected) <= 1.5 * theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer", "i2v_token_replace", "i2v_latent_concat"])
def test_recordings(shared, name):
    """One forward and whole runs, with true CFG and with a first frame."""
    report, _ = check_golden(shared / "goldens" / f"hunyuan_{name}.safetensors")
    assert report.passed, report.first_failure


def lazy(shapes):
    def read(start, stop):
        raise AssertionError("nothing is read")

    return {n: Tensor(tuple(s), np.dtype(np.float32), read) for n, s in shapes.items()}


def inferred(shapes, family=""):
    network, dialect = detect_network(shapes)
    assert network is NETWORK
    return dialect.name, infer_config(network, dialect, shapes, family)


def test_published_names_and_shapes(shared):
    """diffusers', Tencent's and ComfyUI's names map onto each other and our tree, each once."""
    published = json.loads((shared / "checkpoints/hunyuan_video.json").read_text())
    kinds = {
        "t2v": HUNYUAN_VIDEO,
        "i2v_token_replace": HUNYUAN_VIDEO_REPLACE,
        "i2v_latent_concat": HUNYUAN_VIDEO_CONCAT,
    }
    for kind, values in published["configs"].items():
        config = parse_config(HunyuanVideoConfig, values, shared / "config.json")
        assert config == kinds[kind]
        written = config_json(config)
        assert {k: written[k] for k in values} == values
    shapes = {n: tuple(s) for n, s in published["tensors"].items()}
    for stacked in (False, True):
        template = abstract_params(HUNYUAN_VIDEO, stacked=stacked)
        leaves = engine.published_leaves(template)
        assert {n: leaf.shape for n, leaf in leaves.items()} == shapes
        assert parameter_count(template) == published["parameters"] == 12_821_012_544
    theirs = {n: tuple(s) for n, s in published["original_tensors"].items()}
    comfy = {comfy_transformer(n): s for n, s in theirs.items()}
    for tensors, dialect in ((shapes, "published"), (theirs, "bfl"), (comfy, "comfy")):
        for family, config in (
            ("HunyuanVideo text to video", HUNYUAN_VIDEO),
            ("HunyuanVideo image to video", HUNYUAN_VIDEO_REPLACE),
        ):
            assert inferred(tensors, family) == (dialect, config)
        with pytest.raises(ConfigError, match="--family hunyuan-video or hunyuan-video-i2v"):
            inferred(tensors)
        if dialect != "published":
            table = NETWORK.dialect(dialect).table(HUNYUAN_VIDEO)
            found = engine.to_published(lazy(tensors), table, shapes)
            back = engine.from_published(found, table)
            assert {n: t.shape for n, t in back.items()} == tensors
    concat = published["i2v_latent_concat"]
    shapes |= {n: tuple(s) for n, s in concat["other_shapes"].items()}
    shapes = {n: s for n, s in shapes.items() if n not in concat["absent"]}
    template = abstract_params(HUNYUAN_VIDEO_CONCAT)
    assert {n: leaf.shape for n, leaf in engine.published_leaves(template).items()} == shapes
    assert parameter_count(template) == concat["parameters"]
    assert inferred(shapes) == ("published", HUNYUAN_VIDEO_CONCAT)


def test_work_of_a_forward():
    assert NETWORK.flops is not None
    for tokens, petaflops in ((67_320, 4.285), (118_800, 12.069)):
        assert round(NETWORK.flops(HUNYUAN_VIDEO, tokens, 256) / 1e15, 3) == petaflops


def test_values_land_where_diffusers_puts_them():
    tree = random_tree(TINY, np.float32)
    ours = engine.from_tree(tree)
    theirs = engine.from_published(ours, NETWORK.dialect("bfl").table(TINY))
    original = {n: torch.from_numpy(np.array(t.read())) for n, t in theirs.items()}
    # diffusers' function has the published width written in.
    name = "convert_hunyuan_video_transformer_to_diffusers"
    source = inspect.getsource(getattr(single_file_utils, name))
    scope = vars(single_file_utils).copy()
    exec(source.replace("3072", str(TINY.inner_dim)), scope)
    converted = scope[name](original)
    assert converted.keys() == ours.keys()
    for name, tensor in converted.items():
        np.testing.assert_array_equal(tensor.numpy(), ours[name].read(), name)
    table = NETWORK.dialect("bfl").table(TINY)
    back = engine.to_ours(theirs, table, abstract_params(TINY))
    for path, leaf in engine.flatten(tree).items():
        np.testing.assert_array_equal(engine.flatten(back)[path], leaf, str(path))


def test_what_no_network_has_is_refused(tmp_path):
    values = config_json(TINY)
    for key, value in (("patch_size_t", 2), ("qk_norm", "layer_norm")):
        with pytest.raises(ConfigError, match=f"{key}={value!r} is not supported"):
            parse_config(HunyuanVideoConfig, values | {key: value}, tmp_path / "config.json")
    with pytest.raises(ConfigError, match="must be multiples of the 2 x 2 latents"):
        replace(TINY, in_channels=18)
