"""What the embedded FLUX model sees in noisy latents, on another model's path of noise."""

from pathlib import Path
from typing import Any

import chex
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
from fluxjax.train.embedded.examples import Pool, Teaching
from fluxjax.train.embedded.noise_distillation import Lesson, Teacher, lessons, taught_loss
from fluxjax.train.embedded.transformer import image_encoder
from fluxjax.train.flow_matching import Learner
from fluxjax.train.objectives import Objective, debiased_weights

pytestmark = pytest.mark.slow


def _recipe(config: Any) -> Any:
    return diffusion.TinySDRecipe(folder=Path("runs")), config


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
    picture, guessed = teacher.sees(
        teacher.params, state.of(latents, noise), state, heard, jnp.ones(4)
    )

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


def test_of_a_dropped_caption_neither_hears_a_word(lesson):
    """Where all captions are dropped, what they said changes nothing, nor does the guidance."""
    config, teacher, rows, empty = lesson
    path: Any = Learner.of(config).path
    student = diffusion.make_conditioner(*_recipe(config))
    others = jax.tree.map(lambda v: v[::-1], rows.conditioning)

    def taught(dropout: float, guidance: float, heard: Any) -> Any:
        objective = Objective(caption_dropout=dropout)
        teaching = lessons(objective, path, teacher, student, guidance).teaching
        assert teaching is not None
        return teaching.teach(jax.random.key(2), rows.latents, heard, np.ones(4, bool))

    dropped, other = taught(1.0, 2.5, rows.conditioning), taught(1.0, 1.0, others)
    chex.assert_trees_all_close(dropped, other, atol=1e-6)
    nothing = jax.tree.map(lambda v: jnp.repeat(v, 4, axis=0), empty[0])
    chex.assert_trees_all_close(dropped[1], nothing)
    heard = taught(0.0, 2.5, rows.conditioning)
    assert np.abs(heard[0].wanted - dropped[0].wanted).max() > 0.01
    np.testing.assert_array_equal(heard[0].x, dropped[0].x)
    assert np.abs(heard[0].wanted - taught(0.0, 1.0, rows.conditioning)[0].wanted).max() > 0.001


def test_the_loss_of_a_lesson_is_the_weighed_distance_from_what_the_teacher_says(lesson):
    config, _, rows, _ = lesson
    path: Any = Learner.of(config).path
    n = rows.latents.shape[0]
    lesson_ = Lesson(rows.latents, jnp.asarray([5.0, 200.0, 500.0, 999.0]), rows.latents + 2.0)
    given = rows._replace(latents=lesson_, conditioning=rows.conditioning[0])

    class Says(UNet):
        """What it is shown."""

        def __call__(self, sample: Any, *_: Any, **__: Any) -> Any:
            return sample

    loss = taught_loss(STABLE_DIFFUSION, Says(config.unet), path)
    weights = debiased_weights(path, jnp.asarray(lesson_.time))
    assert len(set(np.asarray(weights).tolist())) == n
    said = loss({}, jax.random.key(0), given, {}, None, None, jnp.float32(0))
    np.testing.assert_allclose(said, 4.0 * jnp.mean(weights), rtol=1e-5)


def test_of_what_the_teacher_does_not_know_the_noise_itself_is_learnt(lesson):
    config, teacher, rows, _ = lesson
    path: Any = Learner.of(config).path
    student = diffusion.make_conditioner(*_recipe(config))
    teaching = lessons(Objective(), path, teacher, student, 2.5).teaching
    assert teaching is not None
    known = np.array([True, False, True, False])
    found, _ = teaching.teach(jax.random.key(2), rows.latents, rows.conditioning, known)
    every, _ = teaching.teach(jax.random.key(2), rows.latents, rows.conditioning, known | True)
    np.testing.assert_array_equal(found.wanted[known], every.wanted[known])
    state = path.state(found.time)
    picture = (found.x - state.noise.reshape(-1, 1, 1, 1) * found.wanted) / state.picture.reshape(
        -1, 1, 1, 1
    )
    apart = np.abs(picture - rows.latents).max((1, 2, 3))
    assert (apart[~known] < 1e-4 / state.picture[~known]).all() and (apart[known] > 0.01).all()


def test_captions_that_tell_otherwise_leave_the_pictures_as_they_are(lesson):
    config, *_ = lesson
    student = diffusion.make_conditioner(*_recipe(config))
    stage = diffusion.DiffusionStage(pool=64, buckets=((96, 64),))

    def told(share: float) -> Any:
        teaching = Teaching(lambda key, latents, heard, known: (latents, heard), share, ())
        return Pool(0, stage, student._replace(teaching=teaching), 0, 4).batch(0)

    plain, other = told(0.0), told(1.0)
    np.testing.assert_array_equal(plain.latents, other.latents)
    assert (
        np.abs(plain.conditioning.sequence - other.conditioning.sequence).max((1, 2)) > 0.1
    ).all()
