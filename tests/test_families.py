"""A family's parts agree: what a run hoists is its forward; state, sizes and class names."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import pipelines
from torch_reference import relative_l2

from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import DEV, TINY, ConfigError, ControlNetConfig, FluxConfig
from fluxjax.families import FLUX, Conditioning, Control, Extras, family_of
from fluxjax.models.controlnet import FluxControlNet
from fluxjax.models.flux import FluxTransformer
from fluxjax.models.transformer_blocks import ImagePrompt

SMALL = FluxConfig(
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=6,
    axes_dims_rope=(2, 2, 4),
)

CONTROLNET = ControlNetConfig(**{**vars(SMALL), "num_mode": 3})


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def random_variables(config, dtype) -> dict:
    leaves, tree = jax.tree.flatten({"params": abstract_params(config)})
    random = [(0.3 * normal(i, *leaf.shape)).astype(dtype) for i, leaf in enumerate(leaves)]
    return tree.unflatten(random)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind",
    [
        "text",
        "reference",
        *[
            pytest.param(k, marks=pytest.mark.slow)
            for k in ("control", "channels", "schnell", "image prompt")
        ],
    ],
)
def test_what_a_run_hoists_is_the_forward(kind, dtype):
    """For every step of two pictures, with all that can come beside text."""
    config = replace(
        SMALL, guidance_embeds=kind != "schnell", in_channels=96 if kind == "channels" else 64
    )
    module = FluxTransformer(config, dtype=dtype, param_dtype=dtype)
    latents = FLUX.pack(normal(0, 2, 16, 4, 6))
    extras = Extras(latents.positions, jnp.array([3.5, 1.0]))
    if kind == "reference":
        extras = extras._replace(tokens=FLUX.pack(normal(1, 2, 16, 6, 4), reference=True))
    if kind == "channels":
        extras = extras._replace(channels=normal(1, 2, 6, 32))
    text = Conditioning(normal(2, 2, 5, 12), None, normal(3, 2, 6))
    times = jnp.array([1.0, 0.6875, 0.3])
    variables, in_run = random_variables(config, dtype), extras
    if kind == "control":
        net = FluxControlNet(CONTROLNET, dtype=dtype, param_dtype=dtype)
        seen, mode = normal(4, 2, 16, 4, 6), jnp.array([1, 2])
        control = Control(net, random_variables(CONTROLNET, dtype), seen, jnp.float32(0.6), mode)
        extras = extras._replace(controls=(control,))
        in_run = extras._replace(controls=(control._replace(scale=jnp.full(3, 0.6)),))

    if kind == "image prompt":
        keys, values = normal(4, 2, 1, 2, 4, 16).astype(dtype)
        extras = in_run = extras._replace(image_prompts=(ImagePrompt(keys, values, jnp.ones(1)),))

    @jax.jit
    def run(variables, x):
        def forward(t, extras):
            return FLUX.forward(module, variables, x, jnp.full(2, t), text, extras)

        each, step = FLUX.hoist(module, variables, times, text, in_run)
        hoisted = jax.lax.map(partial(step, x), each)
        plain = jax.lax.map(partial(forward, extras=extras), times)
        beside = ("reference", "channels", "control", "image prompt")
        without = forward(times[0], alone) if kind in beside else None
        return hoisted, plain, without

    blank = jnp.zeros((2, 6, 32)) if kind == "channels" else None
    alone = Extras(latents.positions, extras.guidance, channels=blank)
    hoisted, plain, without = run(variables, latents.values)
    assert plain.shape == (3, *latents.values.shape)
    assert relative_l2(hoisted, plain) <= (1e-6 if dtype == jnp.float32 else 1e-2)
    assert relative_l2(plain[1:], plain[:-1]) > 1e-2, "the time matters"
    if without is not None:
        assert relative_l2(plain[0], without) > 1e-2, "what comes beside matters"


def test_state_packs_and_unpacks():
    assert FLUX.state_shape(DEV, 1024, 768) == (16, 96, 128)
    with pytest.raises(ConfigError, match="height must be a multiple of 16, got 40"):
        FLUX.state_shape(TINY, 64, 40)
    latents = np.random.default_rng(0).standard_normal((2, 16, 4, 6)).astype(np.float32)
    tokens = FLUX.pack(latents)
    assert tokens.values.shape == (2, 6, 64) and tokens.positions.shape == (6, 3)
    np.testing.assert_array_equal(FLUX.unpack(tokens.values, 4, 6), latents)
    assert (FLUX.pack(latents, reference=True).positions[:, 0] == 1).all()
    assert not np.any(tokens.positions[:, 0])


def test_families_are_found_by_class_names_that_diffusers_has():
    assert family_of("FluxPipeline") is FLUX
    with pytest.raises(ConfigError, match="SanaPipeline is no family that is known: Flux") as told:
        family_of("SanaPipeline")
    known = str(told.value).split(": ")[1].split(", ")
    assert {name for name in known if not hasattr(pipelines, name)} == {"OpenSoraPipeline"}
    assert all(name in family_of(name).tasks for name in known)


def test_one_pass_or_the_weight_of_a_difference():
    assert FLUX.passes(8, None).shape == (8, 0)
    assert (FLUX.passes(8, 2.5) == np.float32(2.5)).all() and FLUX.passes(8, 2.5).shape == (8, 1)
