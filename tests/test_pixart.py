"""PixArt's transformer against diffusers, layer by layer, and the published names."""

import copy
import json
from functools import cache

import jax
import jax.numpy as jnp
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from parameter_trees import parameter_count
from test_sd3 import assert_equal, lazy, quickly
from torch_reference import from_torch, relative_l2

from fluxjax.checkpoint import engine
from fluxjax.checkpoint.component_json import config_json, parse_config
from fluxjax.checkpoint.detect import detect_network, infer_config
from fluxjax.checkpoint.lora.names import known_network
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import PIXART_ALPHA, PIXART_SIGMA, ConfigError, PixArtConfig
from fluxjax.diff.layers import captured, pair_layers, recorded
from fluxjax.models.stacking import stack_layers
from fluxjax.networks.pixart import ORIGINAL, PIXART
from fluxjax.parallel.apply import apply_on
from fluxjax.parallel.mesh import make_mesh
from fluxjax.parallel.rules import param_shardings

TINY = PixArtConfig(
    sample_size=16,
    num_layers=2,
    attention_head_dim=12,
    num_attention_heads=4,
    caption_channels=24,
)


@cache
def torch_model():
    torch.manual_seed(0)
    values = {k: v for k, v in config_json(TINY).items() if not k.startswith("_")}
    model = PixArtTransformer2DModel(**values).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.2 if parameter.ndim == 1 else 0.05))
    return model


def run_theirs(dtype=torch.float32):
    x = {k: torch.from_numpy(v) for k, v in PIXART.inputs(TINY).items()}
    x["hidden_states"] = x["hidden_states"].movedim(-1, 1).to(dtype)
    x["encoder_hidden_states"] = x["encoder_hidden_states"].to(dtype)
    sizes = {name: x.pop(name) for name in ("resolution", "aspect_ratio")}
    model = torch_model()
    model = model if dtype == torch.float32 else copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        sample = model(**x, added_cond_kwargs=sizes).sample
    return sample.float().movedim(1, -1).numpy()


def scanned():
    return stack_layers(from_torch(torch_model(), TINY))


def test_every_layer_equals_diffusers():
    with recorded(torch_model()) as layers:
        expected = run_theirs()
    params, module = from_torch(torch_model(), TINY), PIXART.build(TINY)
    capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
    got, state = quickly(
        lambda p, x: module.apply({"params": p}, **x, **capture), params, PIXART.inputs(TINY)
    )
    assert_equal(pair_layers(layers, captured(state["intermediates"])), 40)
    assert relative_l2(got, expected) < 1e-5


def test_a_run_taken_apart_with_scanned_blocks():
    params, x = scanned(), PIXART.inputs(TINY)
    template = abstract_params(TINY, stacked=True)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, template)
    module = PIXART.build(TINY, scan_layers=True)

    def run(p, x):
        def method(name, *args):
            return module.apply({"params": p}, *args, method=name)

        text = method("embed_text", x["encoder_hidden_states"])
        sizes = x["resolution"], x["aspect_ratio"]
        each = method("step_modulations", x["timestep"], 2, *sizes)
        patches = method("patchify", x["hidden_states"])
        size = x["hidden_states"].shape[1:3]
        lengths = x["encoder_attention_mask"].sum(axis=1)

        def step(_, modulations):
            given = patches, method("positions", *size), text, modulations, lengths
            return None, method("unpatchify", method("denoise", *given), *size)

        return jax.lax.scan(step, None, each)[1]

    got, expected = quickly(run, params, x), run_theirs()
    for row in range(2):  # at its own step
        assert relative_l2(got[row, row], expected[row]) < 1e-5


@pytest.mark.slow
def test_on_a_mesh():
    mesh, module = make_mesh("fsdp=2,tensor=2,sequence=2"), PIXART.build(TINY, scan_layers=True)
    params = jax.device_put(scanned(), param_shardings(TINY, scanned(), mesh))
    run = quickly(
        lambda p, x: apply_on(mesh, module, {"params": p}, **x), params, PIXART.inputs(TINY)
    )
    assert relative_l2(run, run_theirs()) < 1e-5


@pytest.mark.slow
def test_bfloat16_is_as_good_as_torch():
    theirs = relative_l2(run_theirs(torch.bfloat16), run_theirs())
    module = PIXART.build(TINY, scan_layers=True, dtype=jnp.bfloat16)
    ours = quickly(lambda p, x: module.apply({"params": p}, **x), scanned(), PIXART.inputs(TINY))
    assert relative_l2(ours.astype(jnp.float32), run_theirs()) <= 1.5 * theirs


REAL = {
    "pixart_alpha_1024": ("PixArt-XL-2-1024-MS", PIXART_ALPHA, 611_349_152),
    "pixart_sigma_1024": ("PixArt-Sigma-XL-2-1024-MS", PIXART_SIGMA, 610_856_096),
}


@pytest.mark.parametrize("name", REAL)
def test_published_names_and_shapes(shared, name):
    """diffusers' and the original names map onto each other and onto our tree, each once."""
    folder, config, parameters = REAL[name]
    published = json.loads((shared / f"checkpoints/{name}.json").read_text())
    path = shared / f"checkpoints/{folder}/transformer/config.json"
    assert parse_config(PixArtConfig, json.loads(path.read_text()), path) == config
    shapes = {n: tuple(s) for n, s in published["tensors"].items()}
    for stacked in (False, True):
        template = abstract_params(config, stacked=stacked)
        leaves = engine.published_leaves(template)
        assert {n: leaf.shape for n, leaf in leaves.items()} == shapes
        assert parameter_count(template) == published["parameters"] == parameters
    original = {n: t.shape for n, t in engine.from_published(lazy(shapes), ORIGINAL).items()}
    assert "blocks.27.cross_attn.kv_linear.weight" in original and "pos_embed" not in original
    back = engine.to_published(lazy(original), ORIGINAL, shapes)
    assert {n: t.shape for n, t in back.items()} == shapes
    # Whole original files hold positions, which tell the size of training, and an empty caption.
    original |= {"pos_embed": (1, 4096, 1152), "y_embedder.y_embedding": (300, 4096)}
    assert engine.to_published(lazy(original), ORIGINAL, shapes).keys() == shapes.keys()
    assert inferred(original) == ("bfl", config)
    if config.use_additional_conditions:
        assert inferred(shapes) == ("published", config)
    else:
        with pytest.raises(ConfigError, match=r"size of picture of this PixArt.*config.json"):
            inferred(shapes)


def inferred(shapes):
    network, dialect = detect_network(shapes)
    assert network is PIXART
    return dialect.name, infer_config(network, dialect, shapes)


def test_sizes_that_a_file_leaves_out(tmp_path):
    values = {**config_json(TINY), "interpolation_scale": None, "use_additional_conditions": None}
    path = tmp_path / "config.json"
    for size, scale, sizes in ((32, 1, False), (128, 2, True), (256, 4, False)):
        config = parse_config(PixArtConfig, values | {"sample_size": size}, path)
        assert (config.interpolation_scale, config.use_additional_conditions) == (scale, sizes)
    with pytest.raises(ConfigError, match="cross_attention_dim=50 is not supported"):
        parse_config(PixArtConfig, values | {"cross_attention_dim": 50}, path)


def test_modules_have_their_original_names_in_adapters_too():
    known = known_network("transformer", abstract_params(TINY))
    assert known.kind is PIXART
    kv = known.modules["blocks_1_cross_attn_kv_linear"]
    assert kv.names == ("transformer_blocks.1.attn2.to_k", "transformer_blocks.1.attn2.to_v")
    assert "transformer_blocks_1_attn2_to_k" in known.modules and "" not in known.modules
