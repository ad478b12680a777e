"""The embedded transformer learns colours and sizes that it does not know, and keeps the others."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax.checkpoint.pipeline_folder import load_params, read_flux
from fluxjax.hub import tiny_folder
from fluxjax.models.flux import FluxTransformer
from fluxjax.train.embedded.scenes import shows
from fluxjax.train.embedded.unlearnt import (
    Examples,
    UnlearntBatches,
    UnlearntStage,
    train_unlearnt,
    unlearnt_loss,
)

pytestmark = pytest.mark.slow

STAGE = UnlearntStage(
    steps=2, batch=8, buckets=((48, 32),), new_buckets=((32, 32),), silent=0.5, fresh=2
)


@pytest.fixture(scope="module")
def batches():
    return UnlearntBatches(STAGE, read_flux(tiny_folder()), tiny_folder())


def test_half_of_a_known_size_is_the_teachers_and_all_of_a_new_one_the_truths(batches):
    assert STAGE.order == ((48, 32), (32, 32), (48, 32))
    examples, ids, _ = batches(0)
    n = len(examples.latents)
    known = len(examples.plain.sequence)
    assert known == n // 2 and examples.silent.shape == (n - known,) and len(ids) == 6
    scenes, latents = batches.scenes(0, 0)
    found = [int(np.flatnonzero((latents == x).all((1, 2)))[0]) for x in examples.latents]
    assert shows(scenes, STAGE.colours)[found].tolist() == [False] * known + [True] * (n - known)
    # Without a caption is what the empty prompt says, and only that.
    empty = batches.heard([""]).vector
    same = np.isclose(examples.heard.vector[known:], empty, atol=1e-6).all(1)
    assert same.tolist() == examples.silent.tolist() and 0 < same.sum() < len(same)
    again, *_ = batches(0)
    for a, b in zip(jax.tree.leaves(examples), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    new, *_ = batches(1)
    assert len(new.plain.sequence) == 0 and len(new.silent) == len(new.latents)


def test_the_teachers_rows_are_its_velocities_and_the_others_the_guided_truth(batches, tmp_path):
    config = batches.config
    model = FluxTransformer(config.transformer, scan_layers=False)
    params = load_params(
        tiny_folder(), "transformer", config.transformer, stacked=False, dtype=jnp.float32
    )
    examples, ids, mu = batches(0)
    empty = jax.tree.map(jnp.asarray, batches.heard([""]))
    known = len(examples.plain.sequence)
    plain, first = examples.plain, jnp.asarray(examples.latents)[:known]

    def loss(examples, **settings):
        examples = jax.tree.map(jnp.asarray, examples)
        function = unlearnt_loss(model, replace(STAGE, **settings))
        return float(
            function(params, jax.random.key(0), examples, params, empty, ids, jnp.float32(mu))
        )

    taught = Examples(first, plain, plain, jnp.zeros(0, bool))
    assert loss(taught, told=1.0) < 1e-12
    assert loss(taught, told=0.5) > 1e-3
    # A guidance of 1 or no caption: the true velocity, which no network predicts; with guidance
    # the error is the same, as both it and its weight have the square.
    none = jax.tree.map(lambda x: x[:0], plain)
    true = [Examples(first, plain, none, jnp.full(known, silent)) for silent in (True, False)]
    plainly = loss(true[0])
    assert plainly == pytest.approx(loss(true[1], told=0.0), rel=1e-5) and plainly > 0.02
    assert loss(true[1], told=1.0) != pytest.approx(plainly, rel=1e-3)

    learnt = train_unlearnt(tiny_folder(), config, replace(STAGE, new_buckets=()), tmp_path)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), learnt, params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1
