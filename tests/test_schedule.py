"""Noise levels equal diffusers' scheduler and BFL's recorded schedules."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from fluxjax.config import DEV, SCHNELL, ConfigError
from fluxjax.families import FLUX, Steps
from fluxjax.schedules import flow_euler, schedule

STATIC = replace(DEV.scheduler, use_dynamic_shifting=False, shift=3.0)


@pytest.mark.parametrize("steps", [1, 4, 20, 28, 50])
@pytest.mark.parametrize("tokens", [36, 256, 1024, 4096])
@pytest.mark.parametrize("config", [DEV.scheduler, SCHNELL.scheduler, STATIC])
def test_equal_to_diffusers(config, tokens, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=config.shift, use_dynamic_shifting=config.use_dynamic_shifting
    )
    retrieve_timesteps(
        scheduler,
        steps,
        sigmas=np.linspace(1.0, 1 / steps, steps),  # pyright: ignore
        mu=calculate_shift(tokens),
    )
    ours = flow_euler.sigmas(steps, tokens, config)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, scheduler.sigmas.numpy())
    if config.use_dynamic_shifting:
        assert config.mu(tokens) == calculate_shift(tokens)
    else:
        assert config.mu(tokens) == math.log(config.shift)


def test_equal_to_bfl(shared):
    recorded = json.loads((shared / "goldens" / "bfl_schedules.json").read_text())["schedules"]
    assert len(recorded) > 20
    for entry in recorded:
        config = DEV.scheduler if entry["shift"] else SCHNELL.scheduler
        arguments = (entry["num_steps"], entry["image_seq_len"], config)
        expected = np.array(entry["timesteps"], np.float32)
        got = flow_euler.sigmas(*arguments)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1.2e-7, err_msg=str(entry))


def test_own_levels_are_shifted_as_diffusers_does():
    own = [1.0, 0.7, 0.2]
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=own, mu=calculate_shift(300))
    ours = flow_euler.sigmas(own, 300, DEV.scheduler)
    np.testing.assert_array_equal(ours, scheduler.sigmas.numpy())


@pytest.mark.parametrize(("steps", "strength"), [(28, 1.0), (28, 0.6), (10, 0.33), (4, 0.1)])
def test_image_to_image_starts_where_diffusers_does(steps, strength):
    start = int(max(steps - min(steps * strength, steps), 0))
    assert flow_euler.start_step(steps, strength) == start
    levels = flow_euler.sigmas(steps, 256, DEV.scheduler)
    run = schedule.pad(FLUX.run(DEV, Steps(steps, start), 32, 32).keeping)
    assert (run.first, run.steps) == (start, steps) and run.active.sum() == steps - start
    np.testing.assert_array_equal(run.keep[:steps], np.stack([1 - levels[1:], levels[1:]], -1))
    assert run.thresholds[start] == 1 and (np.diff(run.thresholds[start:steps]) < 0).all()


def test_bfl_starts_a_step_earlier_where_its_product_falls_short():
    """(1 - 0.8) x 50 is 9.999... in floating point."""
    for steps, strength in ((20, 0.8), (25, 0.8), (50, 0.8), (30, 0.9)):
        bfl = flow_euler.start_step(steps, strength, rounding="bfl")
        assert bfl == flow_euler.start_step(steps, strength) - 1
    assert flow_euler.start_step(28, 1e-20) == 27, "at least one"
    with pytest.raises(ConfigError, match="strength must be above 0"):
        flow_euler.start_step(28, 0.0)


def test_padding_adds_only_steps_of_length_zero():
    levels = flow_euler.sigmas(20, 36, DEV.scheduler)
    table = flow_euler.flow_euler(levels)
    padded = schedule.pad(table)
    assert [len(column) for column in padded[:3]] == [32] * 3
    for longer, column in zip(padded[:3], table[:3], strict=True):
        np.testing.assert_array_equal(longer[:20], column)
    assert padded.active.tolist() == [True] * 20 + [False] * 12 and padded.steps == 20
    part = padded.part(3, 5)
    assert np.flatnonzero(part.active).tolist() == [3, 4] and part.times is padded.times
    assert [schedule.bucket(n) for n in (1, 4, 5, 8, 28, 33, 1000)] == [4, 4, 8, 8, 32, 64, 1024]


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_impossible_steps_are_named(steps):
    with pytest.raises(ConfigError, match=str(steps)):
        flow_euler.sigmas(steps, 256, DEV.scheduler)


def test_impossible_levels_and_strength_are_named():
    with pytest.raises(ConfigError, match="sigmas must fall"):
        flow_euler.sigmas([0.5, 0.9], 256, DEV.scheduler)
    with pytest.raises(ConfigError, match=r"strength .* 1\.5"):
        flow_euler.start_step(4, 1.5)
