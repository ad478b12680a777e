"""Open-Sora 2.0: recordings of its code, its names at real size, schedules and conditions."""

import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameter_trees import parameter_count, to_theirs
from random_checkpoints import bfl_arrays, random_tree
from torch_reference import relative_l2

from fluxjax.checkpoint import engine
from fluxjax.checkpoint.component_json import config_json, parse_config
from fluxjax.checkpoint.detect import detect_network, infer_config
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import Tensor, interleave, of_array, slice_rows
from fluxjax.config import OPEN_SORA_2, OPEN_SORA_2_DC_AE, ConfigError, OpenSoraConfig
from fluxjax.config.video_sizes import video_size
from fluxjax.diff.golden import check_golden
from fluxjax.models.video_condition import given_frames
from fluxjax.networks.open_sora import OPEN_SORA
from fluxjax.parallel.apply import apply_on
from fluxjax.parallel.mesh import make_mesh
from fluxjax.parallel.rules import param_shardings
from fluxjax.sample.denoise import combined
from fluxjax.schedules.open_sora import VideoGuidance, open_sora_levels, open_sora_passes

TINY = OpenSoraConfig(
    in_channels=16,
    out_channels=16,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=128,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    mlp_ratio=1.0,
)
FILES = (
    "conditions.safetensors",
    "schedules.json",
    "prompts_sizes.json",
    *(
        pytest.param(f"{name}.safetensors", marks=pytest.mark.slow)
        for name in ("i2v", "i2v_oscillation", "t2v_oscillation", "loop_patch1")
    ),
)


@pytest.mark.parametrize("file", FILES)
def test_recordings(shared, file):
    """Rotary embeddings of halves and of neighbours, patches of 1 and 2, all kinds of guidance."""
    report, _ = check_golden(shared / "goldens" / f"opensora_{file}")
    assert report.passed, report.first_failure


def lazy(shapes):
    def read(start, stop):
        raise AssertionError("nothing is read")

    return {n: Tensor(tuple(s), np.dtype(np.float32), read) for n, s in shapes.items()}


def inferred(shapes):
    network, dialect = detect_network(shapes)
    assert network is OPEN_SORA
    return dialect.name, infer_config(network, dialect, shapes)


def test_published_names_and_shapes(shared):
    original = json.loads((shared / "checkpoints/opensora_v2.json").read_text())
    theirs = {n: tuple(s) for n, s in original["tensors"].items()}
    assert inferred(theirs) == ("bfl", OPEN_SORA_2)
    for stacked in (False, True):
        template = abstract_params(OPEN_SORA_2, stacked=stacked)
        shapes = {n: leaf.shape for n, leaf in engine.published_leaves(template).items()}
        assert parameter_count(template) == original["parameters"] == 11_891_390_528
    assert inferred(shapes) == ("published", OPEN_SORA_2)
    table = OPEN_SORA.dialect("bfl").table(OPEN_SORA_2)
    found = engine.to_published(lazy(theirs), table, shapes)
    back = engine.from_published(found, table)
    assert {n: t.shape for n, t in back.items()} == theirs
    of_dc_ae = engine.published_leaves(abstract_params(OPEN_SORA_2_DC_AE))
    assert of_dc_ae["cond_in.weight"].shape == (3072, 129)
    values = config_json(OPEN_SORA_2_DC_AE)
    assert parse_config(OpenSoraConfig, values, shared / "config.json") == OPEN_SORA_2_DC_AE


def test_work_of_a_forward():
    for tokens, linear_and_attention in ((8316, 0.169), (76032, 5.092)):
        assert OPEN_SORA.flops is not None
        flops = OPEN_SORA.flops(OPEN_SORA_2, tokens, 512)
        assert round(flops / 1e15, 3) == linear_and_attention


@pytest.mark.parametrize("dialect", ["bfl", "fused"])
def test_names_there_and_back_without_a_bit_lost(dialect):
    config = replace(TINY, patch_size=1)
    tree = random_tree(config, np.float32)
    table = OPEN_SORA.dialect(dialect).table(config)
    theirs = to_theirs(tree, table)
    assert inferred({n: t.shape for n, t in theirs.items()}) == (dialect, config)
    back = engine.to_ours(theirs, table, abstract_params(config))
    for path, leaf in engine.flatten(tree).items():
        np.testing.assert_array_equal(engine.flatten(back)[path], leaf, str(path))


def test_rows_of_halved_heads_are_read_in_any_range():
    rows = np.arange(24).reshape(12, 2)
    turned = interleave(of_array(rows), 6)
    assert turned.read()[:, 0].tolist() == [0, 6, 2, 8, 4, 10, 12, 18, 14, 20, 16, 22]
    for start, stop in ((0, 12), (1, 2), (5, 9), (7, 12)):
        part = slice_rows(turned, start, stop).read()
        np.testing.assert_array_equal(part, turned.read()[start:stop])


@cache
def params():
    tree = random_tree(TINY, np.float32)
    return jax.tree.map(lambda leaf: leaf * (0.05 if leaf.ndim > 1 else 0.2), tree)


@pytest.mark.slow
def test_on_a_mesh_and_taken_apart():
    """Tokens, weights and batch split; scanned; 18 tokens of video and 12 of text on each side."""
    inputs, module = OPEN_SORA.inputs(TINY), OPEN_SORA.build(TINY)
    expected = jax.jit(lambda p, x: module.apply({"params": p}, **x))(params(), inputs)
    mesh = make_mesh("fsdp=2,tensor=2,sequence=2")
    placed = jax.device_put(params(), param_shardings(TINY, params(), mesh))
    got = jax.jit(lambda p, x: apply_on(mesh, module, {"params": p}, **x))(placed, inputs)
    assert relative_l2(got, expected) < 1e-5


def test_fewer_passes_give_the_same():
    """Without pictures two passes do, at steps that rest one."""
    passes = open_sora_passes(14, 3, VideoGuidance(text=7.5, image=3.0))
    each = np.random.default_rng(0).standard_normal((3, 3, 2, 4)).astype(np.float32)
    assert (passes[11] == 1).all() and not (passes[12] == 1).all()
    stacked = jnp.asarray(each)
    np.testing.assert_allclose(combined(stacked, jnp.asarray(passes[11])), each[:1], atol=1e-5)
    assert (passes[:10, 1, 0] == 1).all()  # the first frame is the picture's own
    np.testing.assert_allclose(passes[3, 1], np.linspace(1, 3 - 2 * 3 / 14, 3), rtol=1e-6)
    same = jnp.asarray(each[[0, 1, 1]])
    without = open_sora_passes(14, 3, VideoGuidance(), pictures=False)[4]
    two = each[1] + 7.5 * (each[0] - each[1])
    np.testing.assert_allclose(combined(same, jnp.asarray(without))[0], two, atol=1e-5)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="'480p' is no area of a video: there are 256px"):
        video_size("480p", "16:9")
    with pytest.raises(ConfigError, match="'21:9' is no ratio of 256px"):
        video_size("256px", "21:9")
    assert video_size("768px", "16:9") == (576, 1024)
    shape = (1, 4, 9, 2, 2)
    with pytest.raises(ConfigError, match="v2v_tail needs at least 10 latent frames, got 9"):
        given_frames("v2v_tail", shape, tail=jnp.zeros(shape))
    with pytest.raises(ConfigError, match="i2v_loop gives the last 1 latent frames, got 0"):
        given_frames("i2v_loop", shape, head=jnp.zeros(shape))
    with pytest.raises(ConfigError, match="no kind of video condition"):
        given_frames("i2v", shape)
    with pytest.raises(ConfigError, match="steps must be from 1 to 1000, got 0"):
        open_sora_levels(0, 144, 9)
    names = {n: t.shape for n, t in bfl_arrays(TINY).items()}
    with pytest.raises(ConfigError, match="cond_in has 21 inputs"):
        inferred({**names, "cond_in.weight": (256, 21)})
    with pytest.raises(ConfigError, match="in_channels must be a multiple of the 2 x 2"):
        replace(TINY, in_channels=18)
