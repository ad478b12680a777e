"""Noise levels of the samplers that count in sigmas, and the timesteps that go with them.

Source: `set_timesteps` of diffusers' Euler, Heun, DPM-Solver and UniPC schedulers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fluxjax.config import ConfigError
from fluxjax.config.sampler import SamplerConfig
from fluxjax.schedules.noise_table import sigmas
from fluxjax.schedules.respacing import respaced, timesteps_of
from fluxjax.schedules.spacing import multistep_timesteps, timesteps

ALMOST_ONE = 1e-6


class Levels(NamedTuple):
    """What diffusers calls a scheduler's `sigmas` and `timesteps`."""

    sigmas: Float[np.ndarray, "levels"]
    """One more than there are times, or two, of which the last is not reached. Float32 values as
    float64: diffusers rounds them before it steps."""
    times: Float[np.ndarray, "steps"]


def spaced_levels(config: SamplerConfig, steps: int) -> Levels:
    """Of Euler, ancestral Euler and Heun: the table at the timesteps, which it is respaced within.

    Levels that are respaced have timesteps with fractions.
    """
    table, times = sigmas(config), timesteps(config, steps).astype(np.float32)
    if config.interpolation_type == "log_linear":
        top, bottom = np.log(table[-1]), np.log(table[0])
        # As diffusers, which gives one level more than there are steps: unless they are respaced or
        # their timesteps continuous, the run ends there.
        levels = np.exp(np.linspace(top, bottom, steps + 1, dtype=np.float32)).astype(float)
    else:
        levels = np.interp(times, np.arange(len(table)), table)
    if config.respacing != "plain":
        largest = config.sigma_max or float(levels[0])
        smallest = config.sigma_min or float(levels[-1])
        levels = respaced(config.respacing, largest, smallest, steps)
        times = timesteps_of(levels, table)
    last = table[0] if config.final_sigmas_type == "sigma_min" else 0.0
    found = np.append(levels, last).astype(np.float32).astype(float)
    if config.timestep_type == "continuous" and config.prediction_type == "v_prediction":
        times = 0.25 * np.log(found[:-1])
    return Levels(found, times)


def multistep_levels(config: SamplerConfig, steps: int, mu: float | None = None) -> Levels:
    """Of DPM-Solver and UniPC, which respace the whole table. Their timesteps are whole numbers:
    rounded where karras or lu spaces them, else cut off. `mu`: see `flow_levels`."""
    table, unipc = sigmas(config), config.sampler == "UniPCMultistepScheduler"
    if config.use_flow_sigmas:
        return _multistep_flow(config, steps, mu)
    times = multistep_timesteps(config, steps)
    last: float = float(table[0])
    if config.respacing == "plain":
        levels = np.interp(times, np.arange(len(table)), table)
    else:
        largest, smallest = (config.sigma_max or table[-1]), (config.sigma_min or table[0])
        levels = respaced(config.respacing, float(largest), float(smallest), steps)
        times = timesteps_of(levels, table)
        last = float(levels[-1]) if unipc else last
        cosine = config.beta_schedule == "squaredcos_cap_v2" and not unipc
        if config.respacing in ("karras", "lu") and not cosine:
            times = times.round()
    last = last if config.final_sigmas_type == "sigma_min" else 0.0
    return Levels(np.append(levels, last).astype(np.float32).astype(float), np.trunc(times))


def _multistep_flow(config: SamplerConfig, steps: int, mu: float | None) -> Levels:
    """DPM-Solver and UniPC on a flow have grids of their own, and cut their timesteps off."""
    trained = config.num_train_timesteps or 1000
    if config.respacing != "plain":
        raise ConfigError(f"{config.sampler} has no {config.respacing} sigmas on a flow")
    levels = np.linspace(1, 1 / trained, steps + 1)
    if config.sampler == "UniPCMultistepScheduler":
        levels = _shifted(config, levels[:-1], config.flow_shift or 1.0, mu)
        if config.shift_terminal:
            levels = _to_terminal(levels, config.shift_terminal)
        if abs(levels[0] - 1) < ALMOST_ONE:  # the logarithm of what is left would be infinite
            levels[0] -= ALMOST_ONE
        last = levels[-1] if config.final_sigmas_type == "sigma_min" else 0.0
    else:
        shift = config.flow_shift or 1.0 if mu is None else np.exp(mu)
        levels = 1 - levels
        levels = (shift * levels / (1 + (shift - 1) * levels))[::-1][:-1]
        last = float(sigmas(config)[0]) if config.final_sigmas_type == "sigma_min" else 0.0
    found = np.append(levels, last).astype(np.float32).astype(float)
    return Levels(found, np.trunc(levels * trained))


def flow_levels(
    config: SamplerConfig,
    steps: int,
    mu: float | None = None,
    own: Sequence[float] | None = None,
) -> Levels:
    """Of Euler and Heun on a flow, 1 (noise) to 0 (picture).

    Without `own` levels the last is that of the shifted table, which is then shifted again: so
    SD3's levels were published. `mu` is the logarithm of the shift where the size of the picture
    decides it.
    """
    trained, shift = config.num_train_timesteps or 1000, np.float32(config.shift or 1.0)
    if config.invert_sigmas:
        raise ConfigError("invert_sigmas=True is not supported, only False")
    if own is not None:
        levels = np.asarray(own, np.float32)
    else:
        ends = np.array([1.0, np.float32(1) / np.float32(trained)], np.float32)
        if not config.use_dynamic_shifting:
            ends = shift * ends / (np.float32(1) + (shift - np.float32(1)) * ends)
        first, last = (float(end) * trained for end in ends)
        levels = np.linspace(first, last, steps) / trained
    levels = _shifted(config, levels, config.shift or 1.0, mu)
    if config.shift_terminal:
        levels = _to_terminal(levels, config.shift_terminal)
    if config.respacing != "plain":
        levels = respaced(config.respacing, float(levels[0]), float(levels[-1]), len(levels))
    found = levels.astype(np.float32)
    times = found * np.float32(trained)
    return Levels(np.append(found, np.float32(0)).astype(float), times)


def _shifted(config: SamplerConfig, levels: np.ndarray, shift: float, mu: float | None):
    if not config.use_dynamic_shifting:
        return shift * levels / (1 + (shift - 1) * levels)
    if mu is None:
        raise ConfigError("a dynamic shift is decided by the picture's size, which is not given")
    power = float(np.exp(mu)) if config.time_shift_type == "exponential" else mu
    return power / (power + (1 / levels - 1))


def _to_terminal(levels: np.ndarray, terminal: float) -> np.ndarray:
    rest = 1 - levels
    if rest[-1] == 0:
        raise ConfigError(
            f"shift_terminal={terminal:g} stretches the levels to end there, and a single step is "
            "at level 1: take at least 2"
        )
    return 1 - rest / (rest[-1] / (1 - terminal))
