"""One role for every parameter, and specs that fit the mesh."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from fluxjax import config as presets
from fluxjax.checkpoint.engine import flatten
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import (
    DEV,
    PRESETS,
    AutoencoderConfig,
    CLIPConfig,
    ConfigError,
    UNetConfig,
)
from fluxjax.networks import NETWORKS, network_of
from fluxjax.parallel.mesh import (
    AXES,
    MeshShape,
    batch_parts,
    batch_sharding,
    make_mesh,
    parse_mesh,
)
from fluxjax.parallel.rules import (
    SPECS,
    bytes_per_device,
    param_shardings,
    role_of,
    spec_of,
    state_shardings,
)

FLUX = DEV.transformer
MESHES = ("data=8", "fsdp=8", "tensor=4,fsdp=2", "sequence=4,data=2", "fsdp=2,tensor=2,sequence=2")
# Of UNets a small one has every kind of leaf.
CONFIGS = {part for preset in PRESETS.values() for part in preset.networks.values()}
CONFIGS = {part for part in CONFIGS if not isinstance(part, UNetConfig)} | {
    getattr(presets, name) for name in presets.__all__ if name.startswith(("T5_", "CLIP_"))
}
CONFIGS |= {AutoencoderConfig(use_quant_conv=True, use_post_quant_conv=True)}
UNET = UNetConfig(
    block_out_channels=(64, 128),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1),
    attention_head_dim=(1, 2),
)
TOLD = {"addition_embed_type": "text_time", "time_cond_proj_dim": 32}
CONFIGS |= {UNET, replace(UNET, use_linear_projection=True, **TOLD)}
TEXT = replace(presets.CLIP_L_TEXT, with_projection=True)
VISION = replace(presets.CLIP_L_VISION, with_projection=True)
CONFIGS |= {TEXT, VISION, CLIPConfig(text_config=TEXT, vision_config=VISION)}
CONFIGS |= {replace(presets.SD35_MEDIUM, num_layers=4, dual_attention_layers=(0, 1))}
CONFIGS |= {presets.PIXART_ALPHA, presets.CausalAutoencoderConfig()}
CONFIGS |= {presets.DCAutoencoderConfig()}
CONFIGS |= {
    replace(preset, num_layers=1, num_single_layers=1)
    for preset in (presets.OPEN_SORA_2, presets.HUNYUAN_VIDEO)
}
CONFIGS |= {replace(presets.QWEN3_4B, num_hidden_layers=2)}
SHORT = replace(presets.LLAMA3_8B, num_hidden_layers=2, stops_after=None)
SEEN = replace(presets.LlavaConfig().vision_config, num_hidden_layers=2)
CONFIGS |= {presets.LlavaConfig(text_config=SHORT, vision_config=SEEN)}
CONFIGS |= {presets.UNION, presets.XLABS, presets.SIGLIP_SO400M, presets.REDUX, presets.IP_ADAPTER}
# Of each network's leaves, blocks without their numbers: the mesh axes of each dimension.
RECORDED = json.loads((Path(__file__).parent / "sharding_specs.json").read_text())


def leaves(config):
    """(path, shape) of every leaf, in both forms."""
    for stacked in (False, True):
        for path, leaf in flatten(abstract_params(config, stacked=stacked)).items():
            yield path, leaf.shape


def unnumbered(network, path) -> str:
    groups = "|".join(("down_blocks", "up_blocks", "resnets", "stages", *network.scanned))
    return "/".join(re.sub(rf"^({groups})_\d+(_to_\d+)?$", r"\1", part) for part in path)


@pytest.mark.slow
def test_every_leaf_of_every_network_has_one_role_and_lies_as_recorded():
    assert {type(config) for config in CONFIGS} == set(NETWORKS)
    mesh = AbstractMesh((2, 2, 2, 2), AXES)
    for config in CONFIGS:
        network = network_of(config)
        recorded = {
            path: tuple(None if axes == "-" else tuple(axes.split("+")) for axes in spec.split())
            for spec, paths in RECORDED[type(config).__name__].items()
            for path in paths
        }
        for path, shape in leaves(config):
            roles = {role_of(network, path[:-1]), role_of(network, path)} - {None}
            assert len(roles) == 1, (path, roles)
            wide = tuple(4 * size for size in shape)  # every dimension divides by two axes
            axes = recorded[unnumbered(network, path)]
            if any(axes):
                stacked = any(part in network.scanned or "_to_" in part for part in path)
                axes = (*(None,) * stacked, *axes)
            assert spec_of(network, path, wide, mesh) == P(*axes), path


@pytest.mark.slow
def test_every_role_is_used_and_no_spec_repeats_an_axis():
    for kind, network in NETWORKS.items():
        configs = [config for config in CONFIGS if type(config) is kind]
        paths = {unnumbered(network, path) for config in configs for path, _ in leaves(config)}
        unused = [
            end
            for end in network.roles
            if not any(re.search(rf"(^|/){end}(/|$)", path) for path in paths)
        ]
        assert not unused, network.words
    for spec in (spec for specs in SPECS.values() for spec in specs.values()):
        axes = [axis for axes in spec if axes for axis in ([axes] if axes in AXES else axes)]
        assert set(axes) <= set(AXES)
        assert len(axes) == len(set(axes))


def test_stacked_and_single_blocks_and_states_that_hold_parameters():
    mesh = make_mesh("tensor=4,fsdp=2")
    flux, t5 = network_of(FLUX), network_of(DEV.text_encoder_2)
    for network, path, shape, spec in (
        (flux, "transformer_blocks/attn/to_q/kernel", (9, 96, 96), P(None, "fsdp", "tensor")),
        (flux, "transformer_blocks_7/attn/to_q/kernel", (96, 96), P("fsdp", "tensor")),
        (flux, "single_transformer_blocks_7/proj_out/kernel", (96, 8), P(("tensor", "fsdp"), None)),
        (
            flux,
            "opt/0/mu/single_transformer_blocks/proj_out/kernel",
            (3, 96, 96),
            P(None, ("tensor", "fsdp"), None),
        ),
        (flux, "transformer_blocks/ff/net_2/kernel", (3, 6, 96), P(None, "fsdp", None)),
        (flux, "proj_out/kernel", (96, 64), P("fsdp", None)),
        (flux, "opt/0/proj_out/kernel", (96, 64), P("fsdp", None)),
        (flux, "ema/single_transformer_blocks/proj_mlp/bias", (3, 96), P(None, "tensor")),
        (t5, "x/encoder/block/layer_0/SelfAttention/o/kernel", (2, 3, 5), P()),
        (flux, "lora/transformer_blocks/attn/to_q/b", (19, 4, 96), P(None, None, "tensor")),
        (flux, "lora/transformer_blocks/attn/to_q/scale", (19,), P()),
        (flux, "lora/transformer_blocks/attn/to_q/scale", (), P()),
        (flux, "opt/0/v_row/transformer_blocks/attn/to_q/kernel", (19, 96), None),
        (flux, "step", (), None),
    ):
        found = spec_of(network, tuple(path.split("/")), shape, mesh)
        assert found == spec, path


def test_an_optimiser_is_split_as_its_parameters_are():
    mesh = make_mesh("fsdp=8")
    params = abstract_params(FLUX, stacked=True)
    state = jax.eval_shape(optax.adamw(1e-4).init, params)
    held = bytes_per_device(params, param_shardings(FLUX, params, mesh))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    assert total == 4 * 11_901_408_320
    assert total / 8 <= held <= 1.02 * total / 8
    moments = bytes_per_device(state, state_shardings(FLUX, state, mesh))
    assert 2 * held <= moments <= 2 * held + 64
    # Factored moments follow no rule, and are small.
    factored = jax.eval_shape(optax.adafactor(1e-4).init, params)
    assert bytes_per_device(factored, state_shardings(FLUX, factored, mesh)) < held / 50


def test_what_has_no_role_is_named():
    tree = {"attn": {"to_q": {"kernel": jnp.ones((4, 4))}, "gate": jnp.ones(3)}}
    with pytest.raises(ValueError, match=r"no role is known of:\n  attn/gate \[3\]"):
        param_shardings(FLUX, tree, make_mesh("fsdp=8"))


def test_meshes_are_read_and_made():
    assert parse_mesh("fsdp=4, tensor=2") == MeshShape(fsdp=4, tensor=2)
    assert parse_mesh("") == MeshShape()
    for text in MESHES:
        mesh = make_mesh(text)
        assert mesh.size == 8 and set(jax.typeof(jnp.ones(8)).sharding.mesh.axis_types) <= {
            *mesh.axis_types
        }
    assert dict(make_mesh("fsdp=2").shape) == {"data": 4, "fsdp": 2, "tensor": 1, "sequence": 1}
    assert make_mesh(MeshShape(), jax.devices()[:3]).shape["data"] == 3
    mesh = make_mesh("fsdp=2,tensor=2")
    assert batch_parts(mesh) == 4
    rows = jax.device_put(np.arange(8), batch_sharding(mesh))
    assert rows.addressable_shards[0].data.shape == (2,)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fsdp=3", "does not fit 8 devices.*3, which must divide 8"),
        ("data=2,fsdp=2", "does not fit 8 devices.*2, which data must make up to 8.*simulates 4"),
        ("model=2", "axis=number.*got 'model=2'"),
        ("fsdp", "such as fsdp=4,tensor=2"),
        ("fsdp=two", "got 'fsdp=two'"),
        ("fsdp=2,fsdp=4", "at most once"),
        ("tensor=0", "tensor must be at least 1, got 0"),
    ],
)
def test_impossible_meshes_are_named(text, words):
    with pytest.raises(ConfigError, match=words):
        make_mesh(text)


def test_the_transformer_is_split_over_every_axis_that_it_can_be():
    params = abstract_params(FLUX, stacked=True)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    for text, parts in (("fsdp=8", 8), ("tensor=4,fsdp=2", 8), ("fsdp=2,tensor=2,sequence=2", 4)):
        mesh = make_mesh(text)
        assert bytes_per_device(params, param_shardings(FLUX, params, mesh)) <= 1.02 * total / parts
