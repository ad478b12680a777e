"""SigLIP, the Redux projector and XLabs' IP-Adapter against transformers and diffusers."""

from dataclasses import replace
from functools import cache

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from parameter_trees import parameter_count, to_theirs
from torch_reference import from_torch, relative_l2

from fluxjax.checkpoint.component_json import config_json, network_config
from fluxjax.checkpoint.engine import to_ours
from fluxjax.checkpoint.opened_network import make_network
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import of_array
from fluxjax.config import (
    IP_ADAPTER,
    REDUX,
    SIGLIP_SO400M,
    ConfigError,
    IPAdapterConfig,
    ReduxConfig,
    SiglipVisionConfig,
)
from fluxjax.models.stacking import stack_layers
from fluxjax.networks import network_of
from fluxjax.networks.ip_adapter import XLABS

SIGLIP = SiglipVisionConfig(
    hidden_size=36,
    intermediate_size=50,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=60,
    patch_size=14,
)
PROJECTOR = ReduxConfig(redux_dim=36, txt_in_features=20)
ADAPTER = IPAdapterConfig(
    num_layers=3, inner_dim=24, cross_attention_dim=20, image_embed_dim=18, num_tokens=4
)


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.add_(noise * (0.3 if tensor.ndim == 1 else 0.1))
    return model.eval()


@cache
def siglip(head: bool = True) -> torch.nn.Module:
    values = {**vars(SIGLIP), "vision_use_head": head}
    return randomised(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**values)))


def run(config, params, inputs, *, dtype=jnp.float32, scan=False):
    network = network_of(config)
    module = network.build(config, scan_layers=scan, dtype=dtype, param_dtype=dtype)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    return network.outputs(jax.jit(module.apply)({"params": params}, **inputs))


@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
def test_siglip_equals_transformers(head):
    config = replace(SIGLIP, vision_use_head=head)
    inputs = network_of(config).inputs(config)
    with torch.no_grad():
        expected = siglip(head)(torch.tensor(inputs["pixel_values"]).movedim(-1, 1))
    params = from_torch(siglip(head), config)
    assert config.tokens == 16 and expected.last_hidden_state.shape[1] == 16
    for scan in (False, True):
        ours = run(config, stack_layers(params) if scan else params, inputs, scan=scan)
        assert relative_l2(ours["last_hidden_state"], expected.last_hidden_state) <= 1e-5
        assert ("pooler_output" in ours) == head
        if head:
            assert relative_l2(ours["pooler_output"], expected.pooler_output) <= 1e-5


def test_what_lies_beyond_whole_patches_is_not_seen():
    inputs = network_of(SIGLIP).inputs(SIGLIP)
    params = from_torch(siglip(), SIGLIP)
    first = run(SIGLIP, params, inputs)
    inputs["pixel_values"][:, 56:] = 9
    inputs["pixel_values"][:, :, 56:] = 9
    again = run(SIGLIP, params, inputs)
    np.testing.assert_array_equal(first["last_hidden_state"], again["last_hidden_state"])
    inputs["pixel_values"] = inputs["pixel_values"][:, :56]
    with pytest.raises(ConfigError, match="image_size=60 squared, got 56 x 60"):
        run(SIGLIP, params, inputs)


def test_siglip_in_bfloat16_is_as_good_as_torch():
    inputs = network_of(SIGLIP).inputs(SIGLIP)
    pixels = torch.tensor(inputs["pixel_values"]).movedim(-1, 1)
    ours = run(SIGLIP, from_torch(siglip(), SIGLIP), inputs, dtype=jnp.bfloat16)
    with torch.no_grad():
        exact = siglip()(pixels).last_hidden_state.numpy()
        low = siglip().bfloat16()(pixels.bfloat16()).last_hidden_state.float().numpy()
    siglip().float()
    error = relative_l2(ours["last_hidden_state"].astype(jnp.float32), exact)
    assert error <= min(2e-2, 1.5 * relative_l2(low, exact))


def test_the_projector_equals_diffusers():
    model = randomised(diffusers.ReduxImageEncoder(redux_dim=36, txt_in_features=20))
    inputs = network_of(PROJECTOR).inputs(PROJECTOR)
    states = torch.tensor(inputs["states"])
    params = from_torch(model, PROJECTOR)
    with torch.no_grad():
        expected = model(states).image_embeds
    assert relative_l2(run(PROJECTOR, params, inputs)["image_embeds"], expected) <= 1e-5
    half = run(PROJECTOR, params, inputs, dtype=jnp.bfloat16)["image_embeds"].astype(jnp.float32)
    with torch.no_grad():
        low = model.bfloat16()(states.bfloat16()).image_embeds.float()
    print(relative_l2(half, expected), relative_l2(low, expected))
    assert relative_l2(half, expected) <= min(2e-2, 1.5 * relative_l2(low, expected))


def xlabs_file(config: IPAdapterConfig) -> dict[str, np.ndarray]:
    """Random weights as XLabs publishes them."""
    random = np.random.default_rng(0)
    d, context = config.inner_dim, config.cross_attention_dim
    shapes = {
        "ip_adapter_proj_model.proj.weight": (config.num_tokens * context, config.image_embed_dim),
        "ip_adapter_proj_model.proj.bias": (config.num_tokens * context,),
        "ip_adapter_proj_model.norm.weight": (context,),
        "ip_adapter_proj_model.norm.bias": (context,),
    }
    for i in range(config.num_layers):
        for kind in "kv":
            name = f"double_blocks.{i}.processor.ip_adapter_double_stream_{kind}_proj"
            shapes |= {f"{name}.weight": (d, context), f"{name}.bias": (d,)}
    return {k: random.normal(size=v).astype(np.float32) for k, v in shapes.items()}


def diffusers_adapter(weights: dict[str, np.ndarray]) -> diffusers.FluxTransformer2DModel:
    """A transformer that has read the file, through diffusers' own loader."""
    state = {"image_proj": {}, "ip_adapter": {}}
    for name, array in weights.items():
        first, rest = name.split(".", 1)
        kind = "image_proj" if first == "ip_adapter_proj_model" else "ip_adapter"
        rest = rest.replace("ip_adapter_double_stream_k_proj", "to_k_ip").replace(
            "ip_adapter_double_stream_v_proj", "to_v_ip"
        )
        state[kind][rest.replace("processor.", "")] = torch.tensor(array)
    model = diffusers.FluxTransformer2DModel(
        num_layers=3,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=20,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
        in_channels=8,
    )
    model._load_ip_adapter_weights(state, low_cpu_mem_usage=False)
    return model.eval()


def test_the_ip_adapter_equals_diffusers():
    weights = xlabs_file(ADAPTER)
    model = diffusers_adapter(weights)
    inputs = network_of(ADAPTER).inputs(ADAPTER)
    with torch.no_grad():
        (tokens,) = model.encoder_hid_proj([torch.tensor(inputs["image_embeds"])[:, None]])
        tokens = tokens[:, 0] if tokens.ndim == 4 else tokens
        processors = [block.attn.processor for block in model.transformer_blocks]
        expected = {
            "keys": torch.stack([processor.to_k_ip[0](tokens) for processor in processors]),
            "values": torch.stack([processor.to_v_ip[0](tokens) for processor in processors]),
        }
    params = to_ours(weights, XLABS, abstract_params(ADAPTER))
    for scan in (False, True):
        ours = run(ADAPTER, stack_layers(params) if scan else params, inputs, scan=scan)
        half = stack_layers(params) if scan else params
        half = run(ADAPTER, half, inputs, dtype=jnp.bfloat16, scan=scan)
        for name, value in expected.items():
            assert relative_l2(ours[name], value) <= 1e-5
            assert relative_l2(half[name].astype(jnp.float32), value) <= 2e-2


@pytest.mark.parametrize("config", [SIGLIP, PROJECTOR, ADAPTER, SIGLIP_SO400M, REDUX, IP_ADAPTER])
def test_configurations_are_written_and_read(config, tmp_path):
    assert network_config(config_json(config), tmp_path) == config


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (SIGLIP_SO400M, 428.2),
        (replace(SIGLIP_SO400M, vision_use_head=False), 413.0),
        (REDUX, 64.5),
        (IP_ADAPTER, 490.9),
    ],
)
def test_published_sizes(config, millions):
    assert round(parameter_count(abstract_params(config, stacked=True)) / 1e6, 1) == millions


def test_the_kind_and_its_sizes_are_told_from_names_and_shapes(tmp_path):
    def opened(arrays, **options):
        lazy = {name: of_array(array) for name, array in arrays.items()}
        return make_network(lazy, tmp_path, **options)

    adapter = opened(xlabs_file(ADAPTER))
    assert (adapter.component, adapter.dialect, adapter.config) == ("ip_adapter", "bfl", ADAPTER)
    assert opened({n: t.read() for n, t in adapter.tensors.items()}).dialect == "published"
    both = to_theirs(to_ours(xlabs_file(ADAPTER), XLABS, abstract_params(ADAPTER)), XLABS)
    assert both.keys() == xlabs_file(ADAPTER).keys()

    new = {name: tensor.numpy() for name, tensor in siglip().state_dict().items()}
    old = {f"vision_model.{name.removeprefix('vision_model.')}": v for name, v in new.items()}
    for arrays in (old, {name.removeprefix("vision_model."): v for name, v in old.items()}):
        found = opened(arrays, config=SIGLIP)
        assert (found.component, found.config) == ("siglip", SIGLIP)
    without = {name: v for name, v in old.items() if ".head." not in name}
    assert not opened(without, config=SIGLIP).config.vision_use_head
    with pytest.raises(ConfigError, match=r"heads and the picture's size.*config.json"):
        opened(old)
    with pytest.raises(ConfigError, match="a whole SigLIP"):
        opened({**old, "logit_bias": np.zeros(1)})
