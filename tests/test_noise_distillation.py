"""What the embedded FLUX model sees in noisy latents, on another model's path of noise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax.checkpoint.pipeline_folder import load_params
from fluxjax.families import FLUX, STABLE_DIFFUSION, Extras
from fluxjax.hub import tiny_folder
from fluxjax.models.latents import image_ids, pack, unpack
from fluxjax.models.unet import UNet
from fluxjax.train.embedded import diffusion
from fluxjax.train.embedded.examples import Pool
from fluxjax.train.embedded.noise_distillation import Teacher, taught_loss
from fluxjax.train.embedded.transformer import image_encoder
from fluxjax.train.flow_matching import Learner
from fluxjax.train.objectives import Objective

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lesson() -> Any:
    recipe = diffusion.TinySDRecipe(folder=Path("runs"))
    config, teacher = recipe.config(), Teacher.open(tiny_folder())
    conditioner = teacher.beside(diffusion.make_conditioner(recipe, config))
    stage = diffusion.DiffusionStage(pool=64, buckets=((96, 64),))
    rows = jax.tree.map(jnp.asarray, Pool(0, stage, conditioner, 0, 4).batch(0))
    empty = jax.tree.map(jnp.asarray, conditioner.encode_text([""]))
    return config, teacher, rows, empty


@pytest.mark.parametrize("timestep", [60, 300, 800])
def test_the_teacher_sees_what_it_sees_on_its_own_line(lesson, timestep):
    """The same picture and noise mixed as its sampler mixes them, from its own latents."""
    config, teacher, rows, _ = lesson
    path, vae = Learner.of(config).path, teacher.config.vae
    latents = jnp.asarray(rows.latents)
    noise = jax.random.normal(jax.random.key(1), latents.shape)
    t = jnp.full(4, float(timestep))
    state, heard = path.state(t), rows.conditioning[1]
    picture, guessed = teacher.sees(teacher.params, state.of(latents, noise), state, heard)

    signal, level = (float(part[0]) for part in state)
    own = latents - vae.shift_factor * vae.scaling_factor
    time = level / (signal + level)
    mixed = pack(jnp.moveaxis((1 - time) * own + time * noise, -1, 1))
    extras = Extras(image_ids(*latents.shape[1:3]), jnp.ones(4))
    params = {"params": teacher.params}
    velocity = FLUX.forward(teacher.model, params, mixed, jnp.full(4, time), heard, extras)
    v = np.moveaxis(np.asarray(unpack(velocity, *latents.shape[1:3])), 1, -1)
    np.testing.assert_allclose(guessed - (picture - latents + own), v, atol=3e-5)
    # What it was shown is what it says there is, and early on nearly the picture itself.
    np.testing.assert_allclose(
        state.of(picture, guessed), state.of(latents, noise), atol=3e-6 / signal
    )
    if timestep < 800:
        assert np.square(picture - latents).mean() < {60: 0.02, 300: 0.05}[timestep]


def test_the_latents_of_a_model_that_is_taught_are_the_teachers_but_for_their_shift(lesson):
    config, teacher, *_ = lesson
    vae = load_params(tiny_folder(), "vae", teacher.config.vae, stacked=True, dtype=jnp.float32)
    conditioner = diffusion.make_conditioner(diffusion.TinySDRecipe(folder=Path("runs")), config)
    images = jax.random.uniform(jax.random.key(3), (1, 64, 96, 3), minval=-1.0)
    theirs = unpack(image_encoder(teacher.config, vae)(images), 8, 12)
    moved = -teacher.config.vae.shift_factor * teacher.config.vae.scaling_factor
    ours = jnp.moveaxis(conditioner.encode_image(images), -1, 1)
    np.testing.assert_allclose(theirs, ours + moved, atol=1e-5)
    assert abs(moved) > 0.01


def test_a_dropped_caption_is_dropped_for_both(lesson):
    """Where all captions are dropped, what they said changes nothing."""
    config, teacher, rows, empty = lesson
    learner = Learner.of(config)
    small = {"block_out_channels": (8, 16), "transformer_layers_per_block": (1, 1)}
    model = UNet(replace(config.unet, **small))
    of = jax.jit(model.init)(
        jax.random.key(0), jnp.zeros((1, 8, 12, 16)), jnp.zeros(1), jnp.zeros((1, 77, 128))
    )
    others = rows._replace(conditioning=jax.tree.map(lambda v: v[::-1], rows.conditioning))

    def losses(dropout: float) -> tuple[float, float]:
        loss = jax.jit(
            taught_loss(
                STABLE_DIFFUSION, model, Objective(caption_dropout=dropout), learner, teacher
            )
        )
        given = teacher.params, empty, None, np.float32(0)
        one, two = (float(loss(of["params"], jax.random.key(2), r, *given)) for r in (rows, others))
        return one, two

    dropped, heard = losses(1.0), losses(0.0)
    assert dropped[0] == pytest.approx(dropped[1], rel=1e-6)
    assert abs(heard[0] - heard[1]) > 1e-4 * heard[0]
