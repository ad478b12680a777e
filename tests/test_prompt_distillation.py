"""A pipeline learns from another what captions mean: by the velocities that they lead to."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax.checkpoint.pipeline_folder import load_params, read_flux
from fluxjax.hub import tiny_folder
from fluxjax.models.flux import FluxTransformer
from fluxjax.train.embedded.colours import COLOURS
from fluxjax.train.embedded.paraphrase import open_encoders
from fluxjax.train.embedded.prompt_distillation import Captions, PromptStage, prompt_loss

STAGE = PromptStage(batch=24, buckets=((48, 32),), unlearnt=("white", "black", "gray"), fresh=2)


@pytest.fixture(scope="module")
def learner():
    """(the embedded model's encoders, its batches)."""
    folder = tiny_folder()
    config = read_flux(folder)
    encoders = open_encoders(folder, config)
    vae = load_params(folder, "vae", config.vae, stacked=True, dtype=jnp.float32)
    return encoders, Captions(STAGE, config, encoders, encoders, vae)


def test_batches_repeat_by_step_and_scenes_serve_for_some_steps(learner):
    _, captions = learner
    (first, *texts, _, true), *_ = captions(0)
    (again, *same, _, _), *_ = captions(0)
    np.testing.assert_array_equal(first, again)
    for a, b in zip(jax.tree.leaves(texts), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)
    kept = captions.scenes.kept[0]
    captions(1)
    assert captions.scenes.kept[0] is kept
    captions(STAGE.fresh)
    assert captions.scenes.kept[0] is not kept
    # A row takes the true velocity exactly where an object has such a colour.
    rows = np.random.default_rng((STAGE.seed, 0)).choice(64, STAGE.batch, replace=False)
    names = np.array(list(COLOURS))
    for i, row in enumerate(rows):
        seen = set(names[kept[1].colour[row][: kept[1].count[row]]])
        assert true[i] == bool(seen & set(STAGE.unlearnt))
    assert 0 < true.sum() < len(true)


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
    (latents, _, plain, empty, true), positions, mu = captions(0)
    taught = np.zeros_like(true)

    def found(typed, true):
        rows = (latents, typed, plain, empty, true)
        return float(loss(params, jax.random.key(0), rows, params, positions, mu))

    assert found(plain, taught) < 1e-12
    assert found(empty, taught) > 0.05
    # The true velocity is noisy: no network predicts it.
    assert found(plain, ~taught) > 0.05
