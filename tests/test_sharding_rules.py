"""One rule for every parameter, and specs that fit the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from fluxjax import config as presets
from fluxjax.checkpoint.engine import flatten
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import PRESETS, AutoencoderConfig, ConfigError, FluxConfig
from fluxjax.parallel.mesh import (
    AXES,
    MeshShape,
    batch_parts,
    batch_sharding,
    make_mesh,
    parse_mesh,
)
from fluxjax.parallel.rules import (
    RULES,
    bytes_per_device,
    matching_rules,
    param_shardings,
    spec_of,
    state_shardings,
)

MESHES = ("data=8", "fsdp=8", "tensor=4,fsdp=2", "sequence=4,data=2", "fsdp=2,tensor=2,sequence=2")
CONFIGS = {part for preset in PRESETS.values() for part in preset.networks.values()} | {
    value for name, value in vars(presets).items() if name.startswith(("T5_", "CLIP_"))
}
CONFIGS |= {AutoencoderConfig(use_quant_conv=True, use_post_quant_conv=True)}


def paths(stacked: bool):
    for config in CONFIGS:
        for path, leaf in flatten(abstract_params(config, stacked=stacked)).items():
            yield "/".join(path), leaf.shape


@pytest.mark.parametrize("stacked", [False, True])
def test_every_parameter_of_every_preset_has_exactly_one_rule(stacked):
    wrong = {path: found for path, _ in paths(stacked) if len(found := matching_rules(path)) != 1}
    assert not wrong
    mesh = make_mesh("fsdp=2,tensor=2,sequence=2")
    for path, shape in paths(stacked):
        spec = spec_of(path, shape, mesh)
        assert spec is not None, f"the rule's rank is not {shape} of {path}"


def test_every_rule_is_used_and_none_repeats_an_axis():
    used = {pattern for path, _ in paths(True) for pattern, _ in matching_rules(path)}
    lora = {pattern for pattern, _ in RULES if pattern.endswith((")/a", ")/b", ")/scale"))}
    assert {pattern for pattern, _ in RULES} <= used | lora
    for _, spec in RULES:
        axes = [axis for axes in spec if axes for axis in ([axes] if axes in AXES else axes)]
        assert set(axes) <= set(AXES)
        assert len(axes) == len(set(axes))


def test_stacked_and_single_blocks_and_states_that_hold_parameters():
    mesh = make_mesh("tensor=4,fsdp=2")
    for path, shape, spec in (
        ("transformer_blocks/attn/to_q/kernel", (19, 96, 96), P(None, "fsdp", "tensor")),
        ("transformer_blocks_7/attn/to_q/kernel", (96, 96), P("fsdp", "tensor")),
        ("single_transformer_blocks_7/proj_out/kernel", (96, 96), P(("tensor", "fsdp"), None)),
        ("opt/0/mu/single_transformer_blocks/proj_out/kernel", (3, 96, 96),
         P(None, ("tensor", "fsdp"), None)),
        ("transformer_blocks/ff/net_2/kernel", (3, 6, 96), P(None, "fsdp", None)),
        ("proj_out/kernel", (96, 64), P("fsdp", None)),
        ("opt/0/proj_out/kernel", (96, 64), P("fsdp", None)),
        ("ema/single_transformer_blocks/proj_mlp/bias", (3, 96), P(None, "tensor")),
        ("x/encoder/block/layer_0/SelfAttention/o/kernel", (2, 3, 5), P()),
        ("lora/transformer_blocks/attn/to_q/b", (19, 4, 96), P(None, None, "tensor")),
        ("lora/transformer_blocks/attn/to_q/scale", (19,), P()),
        ("lora/transformer_blocks/attn/to_q/scale", (), P()),
        ("opt/0/v_row/transformer_blocks/attn/to_q/kernel", (19, 96), None),
        ("step", (), None),
    ):  # fmt: skip
        found = spec_of(path, shape, mesh)
        assert found == spec, path


def test_an_optimiser_is_split_as_its_parameters_are():
    mesh = make_mesh("fsdp=8")
    params = abstract_params(PRESETS["dev"].transformer, stacked=True)
    state = jax.eval_shape(optax.adamw(1e-4).init, params)
    held = bytes_per_device(params, param_shardings(params, mesh))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    assert total == 4 * 11_901_408_320
    assert total / 8 <= held <= 1.02 * total / 8
    moments = bytes_per_device(state, state_shardings(state, mesh))
    assert 2 * held <= moments <= 2 * held + 64
    # Factored moments follow no rule, and are small.
    factored = jax.eval_shape(optax.adafactor(1e-4).init, params)
    assert bytes_per_device(factored, state_shardings(factored, mesh)) < held / 50


def test_what_no_rule_is_for_is_named():
    tree = {"attn": {"to_q": {"kernel": jnp.ones((4, 4))}, "gate": jnp.ones(3)}}
    with pytest.raises(ValueError, match=r"no sharding rule is for:\n  attn/gate \[3\]"):
        param_shardings(tree, make_mesh("fsdp=8"))


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
    params = abstract_params(FluxConfig(), stacked=True)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    for text, parts in (("fsdp=8", 8), ("tensor=4,fsdp=2", 8), ("fsdp=2,tensor=2,sequence=2", 4)):
        mesh = make_mesh(text)
        assert bytes_per_device(params, param_shardings(params, mesh)) <= 1.02 * total / parts
