"""Optimisers, schedules, timestep densities, loss weights, accumulation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from optax.contrib import prodigy

from fluxjax.config import ConfigError
from fluxjax.train.objectives import density_times, squared_error, time_weights
from fluxjax.train.optimizers import (
    OptimizerSettings,
    learning_rates,
    make_optimizer,
    matrices,
    muon_dimensions,
    text_encoder_share,
)
from fluxjax.train.settings import Objective
from fluxjax.train.step import init_state, make_step

SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("adafactor", "lion")]


def _rates(steps=100, default=1e-4, **settings):
    rates = learning_rates(OptimizerSettings(**settings), steps, default)
    return [float(rates(step)) for step in range(steps)]


def test_learning_rates_rise_and_fall():
    constant = _rates(warmup=5, learning_rate=1.0)
    np.testing.assert_allclose(constant[:6], [0.2, 0.4, 0.6, 0.8, 1.0, 1.0], rtol=1e-6)
    assert constant[-1] == 1.0
    cosine = _rates(warmup=0, learning_rate=1.0, schedule="cosine", final=0.1)
    assert cosine[0] == 1.0 and cosine[50] == pytest.approx(0.55, abs=1e-6)
    assert 0.1 < cosine[-1] < 0.102
    linear = _rates(warmup=10, learning_rate=1.0, schedule="linear")
    assert linear[10] == 1.0 and linear[55] == pytest.approx(0.5) and linear[-1] < 0.02
    assert _rates(steps=20, warmup=100)[2] == pytest.approx(1e-4)  # at most a tenth of the run
    assert _rates(name="lion")[-1] == pytest.approx(1e-4 / 3)
    assert _rates(name="prodigy")[-1] == 1.0


def _tree(seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    normal = jax.random.normal
    return {
        "to_q": {"kernel": normal(keys[0], (8, 6)), "bias": normal(keys[1], (6,))},
        "blocks": {"to_k": {"a": normal(keys[2], (2, 8, 4)), "b": normal(keys[3], (2, 4, 8))}},
    }


@pytest.mark.parametrize("name", ["adamw", "muon", *SLOWER, "prodigy"])
def test_every_optimiser_goes_downhill(name):
    target, params = _tree(0), _tree(1)

    def distance(params):
        each = jax.tree.map(lambda p, t: jnp.square(p - t).sum(), params, target)
        return sum(jax.tree.leaves(each))

    rate = None if name == "prodigy" else 0.05
    settings = OptimizerSettings(name=name, learning_rate=rate, warmup=0, weight_decay=0.0)
    optimizer = make_optimizer(settings, learning_rates(settings, 300, 1e-4))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(distance)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=300)[0][0])
    assert float(distance(run(params))) < 0.05 * float(distance(params))


@pytest.mark.parametrize("name", ["adamw", "muon", *SLOWER])
def test_decay_shrinks_matrices_alone(name):
    params = _tree(0)
    settings = OptimizerSettings(name=name, learning_rate=0.1, warmup=0, weight_decay=0.5)
    optimizer = make_optimizer(settings, learning_rates(settings, 10, 1e-4))
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    decayed = jax.tree.map(lambda p: -0.05 * p, params)
    decayed["to_q"]["bias"] = jnp.zeros(6)
    jax.tree.map(lambda u, d: np.testing.assert_allclose(u, d, atol=1e-6), updates, decayed)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_text_encoders_have_a_learning_rate_of_their_own(name):
    params = {"transformer": _tree(0), "text_encoder": _tree(0)}
    grads = {"transformer": _tree(1), "text_encoder": _tree(1)}
    settings = OptimizerSettings(
        name=name, learning_rate=0.1, text_encoder_learning_rate=0.02, weight_decay=0.5, warmup=0
    )
    share = text_encoder_share(settings, 1e-4)
    optimizer = make_optimizer(
        settings, learning_rates(settings, 10, 1e-4), {"text_encoder": share}
    )
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    jax.tree.map(
        lambda u, t: np.testing.assert_allclose(0.2 * u, t, rtol=1e-6),
        updates["transformer"],
        updates["text_encoder"],
    )
    still = dataclasses.replace(settings, learning_rate=0.0)
    with pytest.raises(ConfigError, match=r"0\.02 follows the course of learning_rate, which is 0"):
        text_encoder_share(still, 1e-4)


def test_prodigy_decays_as_optax_does_but_matrices_alone():
    params, grads = _tree(0), _tree(1)
    settings = OptimizerSettings(name="prodigy", warmup=0, weight_decay=0.5, clip=0.0)
    rates = learning_rates(settings, 10, 1e-4)
    theirs = prodigy(rates, (0.9, 0.999), weight_decay=0.5, safeguard_warmup=True)
    still = prodigy(rates, (0.9, 0.999), safeguard_warmup=True)
    ours = make_optimizer(settings, rates)
    # Far from where it started, so that the estimated learning rate has risen.
    state = ours.init(jax.tree.map(jnp.zeros_like, params))
    state = state._replace(estim_lr=jnp.float32(0.3), count=jnp.int32(4))
    found, after = ours.update(grads, state, params)
    wanted, expected = theirs.update(grads, state, params)
    wanted["to_q"]["bias"] = still.update(grads, state, params)[0]["to_q"]["bias"]
    assert np.abs(wanted["to_q"]["kernel"]).max() > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)
    jax.tree.map(np.testing.assert_array_equal, after, expected)


def test_gradients_are_clipped_by_their_common_norm():
    params = _tree(0)
    settings = OptimizerSettings(learning_rate=1.0, warmup=0, clip=0.5, b1=0.0, b2=0.0, eps=1e3)
    optimizer = make_optimizer(settings, learning_rates(settings, 10, 1e-4))
    # With eps far above any gradient AdamW's update is the gradient over eps.
    large = jax.tree.map(lambda p: 100.0 * p, params)
    updates, _ = optimizer.update(large, optimizer.init(params), params)
    rest = jax.tree.map(lambda u, m, p: u + 0.01 * p * m, updates, matrices(params), params)
    assert float(optax.tree.norm(rest)) == pytest.approx(0.5 / 1e3, rel=1e-2)


def test_muon_takes_both_factors_of_a_lora():
    dimensions = muon_dimensions(_tree(0))
    assert dimensions["blocks"]["to_k"]["a"].output_axis == 2
    assert dimensions["blocks"]["to_k"]["b"].reduction_axis == 1
    outer = {"x_embedder": {"a": jnp.ones((4, 2)), "kernel": jnp.ones((4, 8))}}
    chosen = muon_dimensions(outer)["x_embedder"]
    assert chosen["kernel"] is None and chosen["a"] is not None


@pytest.mark.parametrize(
    ("objective", "theirs"),
    [
        (
            Objective(density="logit_normal", mean=-0.5, std=1.5),
            {"weighting_scheme": "logit_normal", "logit_mean": -0.5, "logit_std": 1.5},
        ),
        (
            Objective(density="sigmoid"),
            {"weighting_scheme": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0},
        ),
        (Objective(density="mode"), {"weighting_scheme": "mode", "mode_scale": 1.29}),
        (Objective(density="uniform"), {"weighting_scheme": "none"}),
    ],
)
def test_densities_are_those_of_diffusers(objective, theirs):
    count = 40_000
    generator = torch.Generator().manual_seed(0)
    wanted = compute_density_for_timestep_sampling(
        batch_size=count, generator=generator, **theirs
    ).numpy()
    ours = density_times(objective, jax.random.uniform(jax.random.key(0), (count,)), 0.0)
    deciles = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(
        np.quantile(ours, deciles), np.quantile(wanted, deciles), atol=0.015
    )  # the standard error of a median of 40,000 is 0.003


def test_shifted_densities_move_the_median():
    half = jnp.array([0.5])
    assert float(density_times(Objective(density="flux_shift"), half, 1.15)[0]) == pytest.approx(
        0.7595, abs=1e-4
    )
    shifted = density_times(Objective(density="shift"), half, 0.0)
    assert float(shifted[0]) == pytest.approx(3.1582 / 4.1582, abs=1e-5)
    for density in ("flux_shift", "uniform", "logit_normal", "sigmoid", "shift", "mode"):
        ends = density_times(Objective(density=density), jnp.array([0.0, 1.0]), 1.15)
        assert float(ends.min()) > 0 and float(ends.max()) <= 1


@pytest.mark.parametrize("weight", ["sigma_sqrt", "cosmap", "none"])
def test_weights_are_those_of_diffusers(weight):
    t = np.linspace(0.01, 0.99, 50, dtype=np.float32)
    wanted = compute_loss_weighting_for_sd3(weight, torch.from_numpy(t)).numpy()
    np.testing.assert_allclose(time_weights(weight, jnp.asarray(t)), wanted, rtol=1e-5)


def test_weights_multiply_rows():
    velocity, target = jnp.ones((2, 3, 2)), jnp.zeros((2, 3, 2))
    loss = squared_error(velocity, target, jnp.array([[[1.0]], [[3.0]]]))
    assert float(loss) == pytest.approx(2.0)


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_equals_the_whole_batch(parts):
    def loss(params, key, batch, offset):
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (3,)))(
            batch["index"]
        )
        error = batch["x"] @ params["kernel"] - noise + offset
        return jnp.square(error).mean()

    batch = {
        "x": jax.random.normal(jax.random.key(0), (8, 5)),
        "index": jnp.arange(8, dtype=jnp.int32) + 16,
    }
    optimizer = optax.sgd(0.1)
    results = []
    for accumulate in (1, parts):
        step = make_step(loss, optimizer, seed=0, ema_decay=0.0, accumulate=accumulate)
        state = init_state({"kernel": jnp.ones((5, 3))}, optimizer, ema=False)
        for _ in range(3):
            state, metrics = step(state, batch, 0.5)
        assert state.ema is None
        results.append((state.params, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), *results)
