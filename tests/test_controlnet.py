"""FLUX's ControlNets against diffusers: InstantX's union, Shakker's, XLabs' with pixels."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from parameter_trees import parameter_count
from test_flux import CONFIG as TRANSFORMER
from test_flux import parameters as transformer_parameters
from test_flux import torch_model as torch_transformer
from torch_reference import from_torch, relative_l2

from fluxjax.checkpoint.component_json import config_json, network_config
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import UNION, UNION_2, XLABS, ConfigError, ControlNetConfig
from fluxjax.models.controlnet import FluxControlNet
from fluxjax.models.flux import FluxTransformer, Guides, spread
from fluxjax.models.stacking import stack_layers
from fluxjax.models.transformer_blocks import ImagePrompt
from fluxjax.networks import network_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:`FluxPosEmbed`"
)  # diffusers' own, in its ControlNet
SMALL = ControlNetConfig(
    **{**vars(TRANSFORMER), "out_channels": 16, "num_single_layers": 1}, num_mode=4
)
PLAIN = replace(SMALL, num_single_layers=0, num_mode=0)
PIXELS = replace(PLAIN, conditioning_embedding_channels=4)
DEEP = replace(TRANSFORMER, num_layers=3, num_single_layers=3)
KINDS = {"union": SMALL, "plain": PLAIN, "pixels": PIXELS}


@cache
def torch_model(config: ControlNetConfig) -> FluxControlNetModel:
    torch.manual_seed(0)
    values = {k: v for k, v in config_json(config).items() if not k.startswith("_")}
    model = FluxControlNetModel(**values).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".norm_" in name or not parameter.any():  # ones and zeros in a new model
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def torch_samples(config: ControlNetConfig, dtype: torch.dtype, x: dict) -> dict:
    x = {k: torch.tensor(np.asarray(v)) for k, v in x.items()}
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections", "controlnet_cond"):
        x[name] = x[name].to(dtype)
    if config.sees_pixels:
        x["controlnet_cond"] = x["controlnet_cond"].movedim(-1, 1)
    if config.num_mode:
        x["controlnet_mode"] = x["controlnet_mode"].long()[:, None]
    x["timestep"] = (x["timestep"] * 1000).to(dtype) / 1000
    model = torch_model(config).to(dtype)
    with torch.no_grad():
        double, single = model(**x, return_dict=False)
    model.to(torch.float32)
    named = {"double": double or (), "single": single or ()}
    return {f"{k} sample {i}": s.float().numpy() for k, v in named.items() for i, s in enumerate(v)}


def run(config: ControlNetConfig, params: dict, dtype=jnp.float32, scan=False) -> dict:
    network = network_of(config)
    module = network.build(config, scan_layers=scan, dtype=dtype, param_dtype=dtype)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    out = jax.jit(module.apply)({"params": params}, **network.inputs(config))
    return network.outputs(out)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k == "union" else pytest.mark.slow) for k in KINDS]
)
def test_equals_diffusers(kind):
    config = KINDS[kind]
    x = network_of(config).inputs(config)
    expected = torch_samples(config, torch.float32, x)
    params = from_torch(torch_model(config), config)
    for scan in (False, True):
        ours = run(config, stack_layers(params) if scan else params, scan=scan)
        assert ours.keys() == expected.keys()
        for name, sample in expected.items():
            assert relative_l2(ours[name], sample) <= 1e-5, name
    assert len(ours) == config.num_layers + config.num_single_layers


@pytest.mark.slow
def test_bfloat16_is_as_good_as_torch():
    for config in (SMALL, PIXELS):
        x = network_of(config).inputs(config)
        exact = torch_samples(config, torch.float32, x)
        low = torch_samples(config, torch.bfloat16, x)
        ours = run(config, from_torch(torch_model(config), config), jnp.bfloat16)
        for name, sample in exact.items():
            bound = min(2e-2, 1.5 * relative_l2(low[name], sample))
            assert relative_l2(ours[name].astype(jnp.float32), sample) <= bound, name


def test_mode_is_heard_and_asked_for():
    x = network_of(SMALL).inputs(SMALL)
    params = from_torch(torch_model(SMALL), SMALL)
    apply = jax.jit(FluxControlNet(SMALL).apply)
    first, other = (
        apply({"params": params}, **{**x, "controlnet_mode": np.full(2, mode, np.int32)})
        for mode in (0, 1)
    )
    assert relative_l2(first.double[1], other.double[1]) > 1e-3
    del x["controlnet_mode"]
    with pytest.raises(ConfigError, match="needs a mode"):
        jax.eval_shape(FluxControlNet(SMALL).init, jax.random.key(0), **x)


def test_the_other_form_of_control_picture_is_named():
    x = network_of(PLAIN).inputs(PLAIN)
    with pytest.raises(ConfigError, match="as pixels"):
        jax.eval_shape(FluxControlNet(PIXELS).init, jax.random.key(0), **x)


def guided(scan: bool, guides: Guides) -> np.ndarray:
    params = transformer_parameters(DEEP)
    apply = jax.jit(FluxTransformer(DEEP, scan_layers=scan).apply)
    x = network_of(DEEP).inputs(DEEP)
    return apply({"params": stack_layers(params) if scan else params}, **x, guides=guides)


@cache
def unguided() -> np.ndarray:
    return guided(True, Guides())


@pytest.mark.slow
@pytest.mark.parametrize("repeat", [False, True], ids=["stretches", "in turn"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_samples_reach_the_blocks_as_in_diffusers(scan, repeat):
    random = np.random.default_rng(3)
    shape = (2, 30, DEEP.inner_dim)
    double = random.normal(size=(2, *shape)).astype(np.float32)
    single = random.normal(size=(2, *shape)).astype(np.float32)
    guides = Guides(double, single, spread(2, 3, repeat=repeat), spread(2, 3))
    ours = guided(scan, guides)
    x = {k: torch.tensor(v) for k, v in network_of(DEEP).inputs(DEEP).items()}
    with torch.no_grad():
        expected = torch_transformer(DEEP)(
            **x,
            controlnet_block_samples=list(map(torch.tensor, double)),
            controlnet_single_block_samples=list(map(torch.tensor, single)),
            controlnet_blocks_repeat=repeat,
        ).sample
    assert relative_l2(ours, expected) <= 1e-5
    assert relative_l2(ours, unguided()) > 1e-2


def test_the_sixth_of_six_samples_is_never_used():
    assert set(spread(6, 19)) == {0, 1, 2, 3, 4}
    assert spread(2, 19, repeat=True).tolist() == [0, 1] * 9 + [0]


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_image_prompts_are_attended_to_as_in_diffusers(scan):
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    random = np.random.default_rng(3)
    torch.manual_seed(2)
    context, d, layers = DEEP.joint_attention_dim, DEEP.inner_dim, DEEP.num_layers
    tokens = torch.tensor(random.normal(size=(2, 4, context)), dtype=torch.float32)
    fields = {
        k: v for k, v in vars(DEEP).items() if k not in ("rope_theta", "mlp_ratio", "qkv_bias")
    }
    model = FluxTransformer2DModel(**fields).eval()
    model.load_state_dict(torch_transformer(DEEP).state_dict())
    scales = [0.7, 0.0, 1.0]
    processors = {
        name: FluxIPAdapterAttnProcessor(d, context, (4,), scales[int(name.split(".")[1])])
        if name.startswith("transformer_blocks")
        else processor
        for name, processor in model.attn_processors.items()
    }
    model.set_attn_processor(processors)
    keys, values = (
        np.stack(
            [
                getattr(block.attn.processor, name)[0](tokens).detach().numpy()
                for block in model.transformer_blocks
            ]
        )
        for name in ("to_k_ip", "to_v_ip")
    )
    prompt = ImagePrompt(keys, values, np.asarray(scales, np.float32))
    ours = guided(scan, Guides(prompts=(prompt,)))
    x = {k: torch.tensor(v) for k, v in network_of(DEEP).inputs(DEEP).items()}
    with torch.no_grad():
        expected = model(**x, joint_attention_kwargs={"ip_hidden_states": [tokens]}).sample
    assert len(keys) == layers
    assert relative_l2(ours, expected) <= 1e-5
    assert relative_l2(ours, unguided()) > 1e-3


@pytest.mark.parametrize("config", [*KINDS.values(), UNION, UNION_2, XLABS])
def test_configurations_are_written_and_read(config, tmp_path):
    written = config_json(config)
    assert network_config(written, tmp_path) == config
    accepted = {**written, "num_layers": 1, "num_single_layers": 0, "num_attention_heads": 1}
    small = FluxControlNetModel.from_config(
        {**accepted, "axes_dims_rope": [4, 6, 6], "attention_head_dim": 16}
    )
    assert small.config.patch_size == (2 if config.sees_pixels else 1)


def test_patches_of_pixels_are_two_by_two(tmp_path):
    with pytest.raises(ConfigError, match=r"patch_size=1.*only 2"):
        network_config({**config_json(XLABS), "patch_size": 1}, tmp_path)
    with pytest.raises(ConfigError, match="quarter of in_channels=64, got 8"):
        replace(XLABS, conditioning_embedding_channels=8)


@pytest.mark.parametrize(("config", "billions"), [(UNION, 3.302), (UNION_2, 2.141), (XLABS, 0.744)])
def test_published_sizes(config, billions):
    assert round(parameter_count(abstract_params(config, stacked=True)) / 1e9, 3) == billions
