"""A pipeline learns from another what captions mean: by the velocities that they lead to."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax.checkpoint.pipeline_folder import load_params, read_flux
from fluxjax.hub import tiny_folder
from fluxjax.models.flux import FluxTransformer
from fluxjax.train.embedded.paraphrase import open_encoders
from fluxjax.train.embedded.prompt_distillation import Captions, PromptStage, prompt_loss

STAGE = PromptStage(batch=24, buckets=((48, 32),), fresh=2)


@pytest.fixture(scope="module")
def learner():
    """(the embedded model's encoders, its batches)."""
    folder = tiny_folder()
    config = read_flux(folder)
    encoders = open_encoders(folder, config)
    vae = load_params(folder, "vae", config.vae, stacked=True, dtype=jnp.float32)
    return encoders, Captions(STAGE, config, encoders, encoders, vae)


@pytest.mark.slow
def test_batches_repeat_by_step_and_scenes_serve_for_some_steps(learner):
    _, captions = learner
    (first, *texts), *_ = captions(0)
    (again, *same), *_ = captions(0)
    np.testing.assert_array_equal(first, again)
    for a, b in zip(jax.tree.leaves(texts), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)
    kept = captions.scenes.kept[0]
    captions(1)
    assert captions.scenes.kept[0] is kept
    captions(STAGE.fresh)
    assert captions.scenes.kept[0] is not kept


@pytest.mark.slow
def test_loss_is_zero_for_the_teacher_itself_and_grows_with_what_it_lacks(learner):
    encoders, captions = learner
    config = captions.config
    model = FluxTransformer(config.transformer, scan_layers=False)
    transformer = load_params(
        tiny_folder(), "transformer", config.transformer, stacked=False, dtype=jnp.float32
    )
    params = {**encoders.params, "transformer": transformer}
    loss = jax.jit(prompt_loss(model, encoders, encoders, replace(STAGE, guidance=2.0)))
    (latents, _, plain), positions, mu = captions(0)

    def found(typed):
        rows = (latents, typed, plain)
        return float(loss(params, jax.random.key(0), rows, params, positions, mu))

    assert found(plain) < 1e-12
    assert found(encoders.ids([""] * STAGE.batch)) > 0.05
