"""CLIP's text and vision encoders against transformers on tiny random configurations."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from parameter_trees import parameter_count
from random_checkpoints import random_tree
from torch_reference import from_torch, relative_l2

from fluxjax.checkpoint.component_json import parse_config
from fluxjax.checkpoint.engine import published_leaves
from fluxjax.checkpoint.lora.changes import Adapter
from fluxjax.checkpoint.lora.reader import low_rank_tree
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import (
    CLIP_BASE_TEXT,
    CLIP_BASE_VISION,
    CLIP_BIGG_TEXT,
    CLIP_H_TEXT,
    CLIP_L_TEXT,
    CLIP_L_VISION,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ConfigError,
)
from fluxjax.models.clip import CLIPTextModel
from fluxjax.models.clip_vision import CLIPModel, CLIPVisionModel
from fluxjax.models.lora import adapter_sites
from fluxjax.models.names import flatten
from fluxjax.models.stacking import stack_layers

TEXT = CLIPTextConfig(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    projection_dim=24,
    num_hidden_layers=3,
    num_attention_heads=4,
)
VISION = CLIPVisionConfig(
    hidden_size=40,
    intermediate_size=64,
    projection_dim=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=24,
    patch_size=8,
    hidden_act="gelu",
)
IDS = np.random.default_rng(0).integers(3, 98, (3, 77))
IDS[:, 20:] = 1
IDS[0, 40], IDS[1, 5], IDS[2, 76] = 98, 98, 98
PIXELS = np.random.default_rng(1).normal(size=(2, 24, 24, 3)).astype(np.float32)


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.add_(noise * (0.3 if tensor.ndim == 1 else 0.1))
    return model.eval()


def torch_config(config: CLIPTextConfig | CLIPVisionConfig):
    kind = "Text" if isinstance(config, CLIPTextConfig) else "Vision"
    return getattr(transformers, f"CLIP{kind}Config")(**vars(config))


def run(module, params, inputs):
    return jax.jit(module.apply)({"params": params}, inputs)


@pytest.mark.slow
def test_gradients_of_a_lora_are_pefts():
    """Of every layer, scanned; loss over the pooled state, which is what FLUX.1 reads."""
    torch.manual_seed(0)
    base = randomised(transformers.CLIPTextModel(torch_config(TEXT)))
    params = stack_layers(from_torch(base, TEXT))
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    chosen = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    model = peft.inject_adapter_in_model(chosen, base)
    weights = torch.randn(len(IDS), TEXT.hidden_size)
    (model(torch.tensor(IDS)).pooler_output * weights).sum().backward()

    def tree(of):
        found = {}
        for name, layer in model.named_modules():
            if hasattr(layer, "lora_A"):
                a, b = (of(one["default"].weight).numpy() for one in (layer.lora_A, layer.lora_B))
                found[f"text_model.encoder.{name.partition('encoder.')[2]}"] = Adapter(a, b, 2.0)
        assert len(found) == 6 * TEXT.num_hidden_layers
        return low_rank_tree(found, params)

    def loss(lora):
        module = CLIPTextModel(TEXT, scan_layers=True)
        output: Any = module.apply({"params": params, "lora": lora}, jnp.asarray(IDS))
        return (output.pooler_output * weights.numpy()).sum()

    found = jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, tree(lambda one: one.detach())))
    expected = flatten(tree(lambda one: one.grad))
    for path, gradient in flatten(found).items():
        if path[-1] != "scale":
            assert relative_l2(gradient, expected[path]) <= 1e-5, path  # measured: 1.4e-6


def test_an_adapter_counts_in_layers_that_are_scanned():
    """In the output of some of them, which Stable Diffusion reads, as one by one."""
    params, rng = random_tree(TEXT, np.float32), np.random.default_rng(2)
    adapters = {
        site.names[0]: Adapter(*(rng.normal(size=(2, n)) for n in site.shape), scale=0.1)
        for site in adapter_sites(params)
    }
    adapters = {name: one._replace(b=one.b.T) for name, one in adapters.items()}

    def states(tree, adapters, *, scan):
        variables = {"params": tree, "lora": low_rank_tree(adapters, tree)}
        run = jax.jit(CLIPTextModel(TEXT, scan_layers=scan).apply)
        return run(variables, IDS, np.full(len(IDS), 2)).last_hidden_state

    one_by_one, plain = (states(params, each, scan=False) for each in (adapters, {}))
    assert relative_l2(plain, one_by_one) > 0.1
    assert relative_l2(states(stack_layers(params), adapters, scan=True), one_by_one) <= 1e-5


@pytest.mark.parametrize("eos", [2, 98, 7], ids=["published", "true eos", "not the highest id"])
def test_text_equals_transformers(eos):
    config = replace(TEXT, eos_token_id=eos, with_projection=True)
    ids = IDS.copy()
    if eos == 7:
        ids[ids == 7] = 8
        ids[:, [30, 60]] = 7
    model = randomised(transformers.CLIPTextModelWithProjection(torch_config(config)))
    with torch.no_grad():
        expected = model(torch.tensor(ids), output_hidden_states=True)
        pooled = model.text_model(torch.tensor(ids)).pooler_output
    params = from_torch(model, config)
    for scan in (False, True):
        module = CLIPTextModel(config, scan_layers=scan)
        ours = run(module, stack_layers(params) if scan else params, ids)
        assert relative_l2(ours.last_hidden_state, expected.last_hidden_state) <= 1e-5
        assert relative_l2(ours.penultimate_hidden_state, expected.hidden_states[-2]) <= 1e-5
        assert relative_l2(ours.pooler_output, pooled) <= 1e-5
        assert relative_l2(ours.text_embeds, expected.text_embeds) <= 1e-5


def test_text_without_projection():
    model = randomised(transformers.CLIPTextModel(torch_config(TEXT)))
    params = from_torch(model, TEXT)
    ours = run(CLIPTextModel(TEXT), params, IDS)
    with torch.no_grad():
        assert relative_l2(ours.pooler_output, model(torch.tensor(IDS)).pooler_output) <= 1e-5
    assert ours.text_embeds is None


def test_vision_equals_transformers():
    config = replace(VISION, with_projection=True)
    model = randomised(transformers.CLIPVisionModelWithProjection(torch_config(VISION)))
    with torch.no_grad():
        pixels = torch.tensor(PIXELS).permute(0, 3, 1, 2)
        expected = model(pixels)
        pooled = model.vision_model(pixels).pooler_output
    params = from_torch(model, config)
    for scan in (False, True):
        module = CLIPVisionModel(config, scan_layers=scan)
        ours = run(module, stack_layers(params) if scan else params, PIXELS)
        assert relative_l2(ours.last_hidden_state, expected.last_hidden_state) <= 1e-5
        assert relative_l2(ours.pooler_output, pooled) <= 1e-5
        assert relative_l2(ours.image_embeds, expected.image_embeds) <= 1e-5


@pytest.mark.slow
def test_both_towers_equal_clip_model():
    config = transformers.CLIPConfig(
        text_config=torch_config(TEXT).to_dict(),
        vision_config=torch_config(VISION).to_dict(),
        projection_dim=24,
    )
    model = randomised(transformers.CLIPModel(config))
    with torch.no_grad():
        expected = model(torch.tensor(IDS), torch.tensor(PIXELS).permute(0, 3, 1, 2))
    ours = CLIPConfig(
        text_config=replace(TEXT, with_projection=True),
        vision_config=replace(VISION, with_projection=True),
    )
    params = from_torch(model, ours)
    for scan in (False, True):
        module = CLIPModel(ours, scan_layers=scan)
        placed = stack_layers(params) if scan else params
        text, image = jax.jit(module.apply)({"params": placed}, IDS, PIXELS)
        logits = np.exp(params["logit_scale"]) * np.asarray(text) @ np.asarray(image).T
        assert relative_l2(logits, expected.logits_per_text) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("projects", [False, True], ids=["H", "bigG"])
def test_openclip_in_bfloat16_is_as_good_as_torch(projects):
    """The state after the last norm, that before the last layer, and of bigG the pooled text."""
    config = replace(TEXT, hidden_act="gelu", with_projection=projects)
    kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    model = randomised(kind(torch_config(config)))
    found = run(CLIPTextModel(config, dtype=jnp.bfloat16), from_torch(model, config), IDS)

    def theirs():
        with torch.no_grad():
            out = model(torch.tensor(IDS), output_hidden_states=True)
        states = {"last": out.last_hidden_state, "before": out.hidden_states[-2]}
        if projects:
            states["pooled"] = out.text_embeds
        return {name: state.float().numpy() for name, state in states.items()}

    ours = {"last": found.last_hidden_state, "before": found.penultimate_hidden_state}
    ours |= {"pooled": found.text_embeds} if projects else {}
    exact = theirs()
    model.bfloat16()
    rough = theirs()
    for name, state in ours.items():
        error = relative_l2(state.astype(jnp.float32), exact[name])
        assert error <= 1.5 * relative_l2(rough[name], exact[name]), name


def test_bfloat16_is_as_good_as_torch():
    text = randomised(transformers.CLIPTextModelWithProjection(torch_config(TEXT)))
    vision = randomised(transformers.CLIPVisionModelWithProjection(torch_config(VISION)))
    pixels = torch.tensor(PIXELS).permute(0, 3, 1, 2)
    config, config_v = (replace(c, with_projection=True) for c in (TEXT, VISION))
    ours = CLIPTextModel(config, dtype=jnp.bfloat16)
    ours = run(ours, from_torch(text, config), IDS).last_hidden_state.astype(jnp.float32)
    ours_v = CLIPVisionModel(config_v, dtype=jnp.bfloat16)
    ours_v = run(ours_v, from_torch(vision, config_v), PIXELS)
    ours_v = ours_v.last_hidden_state.astype(jnp.float32)
    with torch.no_grad():
        for model, inputs, mine in (
            (text, torch.tensor(IDS), ours),
            (vision, pixels, ours_v),
        ):
            expected = model(inputs).last_hidden_state.numpy()
            half = inputs if inputs.dtype == torch.int64 else inputs.bfloat16()
            theirs = model.bfloat16()(half).last_hidden_state.float().numpy()
            bound = min(2e-2, 1.5 * relative_l2(theirs, expected))
            assert relative_l2(mine, expected) <= bound


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (CLIP_L_TEXT, 123_060_480),
        (CLIP_BASE_TEXT, 63_165_952),
        (CLIP_L_VISION, 303_179_776),
        (CLIP_BASE_VISION, 87_456_000),
    ],
    ids=["text L", "text base", "vision L", "vision base"],
)
def test_presets_have_the_published_size(config, count):
    if isinstance(config, CLIPTextConfig):
        module, shape, dtype = CLIPTextModel(config, scan_layers=True), (1, 77), jnp.int32
    else:
        size = config.image_size
        module, shape, dtype = (
            CLIPVisionModel(config, scan_layers=True),
            (1, size, size, 3),
            jnp.float32,
        )
    inputs = jax.ShapeDtypeStruct(shape, dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(
    ("config", "name", "folder"),
    [
        (CLIP_L_TEXT, "clip_l", "stable-diffusion-v1-5/text_encoder"),
        (CLIP_H_TEXT, "openclip_h_23", "stable-diffusion-2-1/text_encoder"),
        (CLIP_BIGG_TEXT, "clip_bigg", "stable-diffusion-xl-base-1.0/text_encoder_2"),
    ],
    ids=["L", "H", "bigG"],
)
def test_text_has_the_published_names_and_shapes(shared, config, name, folder):
    published = json.loads((shared / f"checkpoints/{name}.json").read_text())
    path = shared / f"checkpoints/{folder}/config.json"
    assert parse_config(CLIPTextConfig, json.loads(path.read_text()), path) == config
    template = abstract_params(config)
    shapes = {n: list(leaf.shape) for n, leaf in published_leaves(template).items()}
    assert shapes == published["tensors"]
    assert parameter_count(template) == published["parameters"]


def test_wrong_sizes_are_refused():
    with pytest.raises(ConfigError, match="image_size=24"):
        CLIPVisionModel(VISION).init(jax.random.key(0), jnp.zeros((1, 24, 32, 3)))
    with pytest.raises(ConfigError, match="77"):
        CLIPTextModel(TEXT).init(jax.random.key(0), jnp.zeros((1, 78), int))
