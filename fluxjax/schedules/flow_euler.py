"""Flow matching with Euler steps: levels linear in time, shifted towards noise for large pictures.

Source: diffusers `FlowMatchEulerDiscreteScheduler` and `calculate_shift`; BFL `get_schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from fluxjax.config import ConfigError, SchedulerConfig
from fluxjax.config.choices import MAX_STEPS
from fluxjax.config.sampler import SamplerConfig
from fluxjax.schedules.schedule import Schedule
from fluxjax.schedules.sigma_levels import flow_levels
from fluxjax.schedules.step_table import NOISE, OUTPUT, SAMPLE, Run, StepTable, X


def sigmas(
    steps: int | Sequence[float],
    image_tokens: int,
    config: SchedulerConfig,
) -> Float[np.ndarray, "levels"]:
    """The noise levels of a run, from 1 (noise) down to 0 (picture): one more than steps, float32.

    Bit for bit those of diffusers, and within 1.2e-7 of BFL's, who round in another order.

    Args:
      steps: their number, or own levels before the shift (without the last 0), as diffusers takes.
      image_tokens: tokens of one picture, for the dynamic shift.

    Raises ConfigError for steps outside 1 ... 1000.
    """
    count, own = own_levels(steps)
    one = np.float32(1.0)
    levels = np.linspace(1.0, 1.0 / count, count) if own is None else np.asarray(own, np.float64)
    levels = levels.astype(np.float32)
    if config.use_dynamic_shifting:
        power = np.float32(math.exp(config.mu(image_tokens)))
        levels = power / (power + (one / levels - one))
    else:
        shift = np.float32(config.shift)
        levels = shift * levels / (one + (shift - one) * levels)
    return np.append(levels, np.float32(0.0)).astype(np.float32)


def own_levels(steps: int | Sequence[float]) -> tuple[int, Sequence[float] | None]:
    """How many steps, and their levels where they are given.

    Raises ConfigError for a number outside 1 ... 1000, and levels that are none.
    """
    if isinstance(steps, int):
        return check_steps(steps), None
    levels = np.asarray(steps, np.float64).astype(np.float32)
    if not (levels > 0).all() or (levels > 1).any() or (np.diff(levels) > 0).any():
        raise ConfigError(f"sigmas must fall from at most 1 and stay above 0, got {steps}")
    return check_steps(len(steps)), steps


def check_steps(steps: int) -> int:
    """Returns `steps`; raises ConfigError unless 1 <= steps <= 1000."""
    if not 1 <= steps <= MAX_STEPS:
        raise ConfigError(f"steps must be from 1 to {MAX_STEPS}, got {steps}")
    return steps


def start_step(steps: int, strength: float, *, rounding: str = "diffusers") -> int:
    """The first step that image to image runs: strength 1 starts from noise.

    BFL multiplies (1 - strength) by the steps, which for 0.8 and 0.9 comes out one step earlier at
    some numbers of steps. Raises ConfigError for a strength of no step, 0, and outside 0 ... 1.
    """
    if not 0.0 < strength <= 1.0:
        raise ConfigError(f"strength must be above 0 and at most 1, got {strength}")
    first = (1.0 - strength) * steps if rounding == "bfl" else steps - steps * strength
    return min(int(first), steps - 1)


def flow_euler(levels: Float[np.ndarray, "levels"], *, first: int = 0) -> Schedule:
    """The Euler steps along `levels`: x + (next - level) v. Steps of length zero are skipped.

    Image to image runs from the step `first`.
    """
    gains = np.diff(levels)
    return Schedule(levels[:-1], gains, gains != 0).part(first, len(gains))


def sampled_flow(
    config: SamplerConfig,
    steps: int,
    first: int = 0,
    *,
    mu: float | None = None,
    own: Sequence[float] | None = None,
) -> Run:
    """The same steps in the program that all samplers share, and with stochastic sampling, which
    predicts the picture and noises it anew. `mu`, `own`: see `flow_levels`."""
    levels, times = flow_levels(config, steps, mu, own)
    table = StepTable(config)
    for i in range(first, len(times)):
        s, after = levels[i], levels[i + 1]
        x, gain = X + (after - s) * OUTPUT, after - s
        if config.stochastic_sampling:
            x, gain = (1 - after) * (X - s * OUTPUT) + after * NOISE, s
        draws = bool(config.stochastic_sampling)
        table.add(times[i], {SAMPLE: x}, (1 - s, s), gain=gain, draws=draws)
    return table.run()
