"""PNDM (Liu et al. 2022), with and without its Runge-Kutta start.

Its list of evaluations is longer than the steps: without Runge-Kutta the second timestep comes
twice, with it the first three steps take four evaluations each. Source: diffusers `PNDMScheduler`.
"""

from __future__ import annotations

import numpy as np

from fluxjax.config import ConfigError
from fluxjax.config.sampler import SamplerConfig
from fluxjax.schedules.noise_table import alphas_cumprod
from fluxjax.schedules.spacing import timesteps
from fluxjax.schedules.step_table import (
    ADDED,
    ANCHOR,
    FIRST,
    FROM,
    H1,
    H2,
    H3,
    OUTPUT,
    SAMPLE,
    SECOND,
    SUM,
    THIRD,
    Latent,
    Run,
    StepTable,
    X,
)

ORDER = 4
ADAMS_BASHFORTH = (
    OUTPUT,
    (3 * OUTPUT - H1) / 2,
    (23 * OUTPUT - 16 * H1 + 5 * H2) / 12,
    (55 * OUTPUT - 59 * H1 + 37 * H2 - 9 * H3) / 24,
)
PUSH = {FIRST: OUTPUT, SECOND: H1, THIRD: H2}


def pndm(config: SamplerConfig, steps: int, first: int = 0) -> Run:
    """`first` counts evaluations. A run from the middle has no history, and passes a timestep once
    that a whole run passes twice: one step of noise is left, as in diffusers."""
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise ConfigError(f"PNDM cannot use prediction_type={config.prediction_type!r}")
    left, table = alphas_cumprod(config).tolist(), StepTable(config)
    final = 1.0 if config.set_alpha_to_one else left[0]
    ratio = len(left) // steps

    def moved(x: Latent, now: int, before: int, output: Latent) -> Latent:
        a, b = left[now], left[before] if before >= 0 else final
        if config.prediction_type == "v_prediction":
            output = a**0.5 * output + (1 - a) ** 0.5 * x
        share = a * (1 - b) ** 0.5 + (a * (1 - a) * b) ** 0.5
        return (b / a) ** 0.5 * x - (b - a) / share * output

    runge_kutta, multistep = _timesteps(config, steps, ratio)
    known = 0  # outputs in the history
    for count, t in enumerate([*runge_kutta, *multistep][first:]):
        rows: dict[int, Latent] = {}
        if count < len(runge_kutta):
            stage = count % 4
            now, before = runge_kutta[count - stage], t - (0 if count % 2 else ratio // 2)
            known += stage == 0
            rows = {**PUSH, ANCHOR: X} if stage == 0 else {}
            output = ADDED + OUTPUT / 6 if stage == 3 else OUTPUT
            rows[SUM] = (ADDED + OUTPUT / 6, ADDED + OUTPUT / 3, ADDED + OUTPUT / 3, 0 * X)[stage]
            rows[SAMPLE] = moved(X if stage == 0 else FROM, now, before, output)
        elif count == 1:
            rows[SAMPLE] = moved(FROM, t + ratio, t, (OUTPUT + H1) / 2)
        else:
            known = min(known + 1, ORDER)
            output = ADAMS_BASHFORTH[known - 1]
            rows = {**PUSH, ANCHOR: X, SAMPLE: moved(X, t, t - ratio, output)}
        table.add(t, rows, (left[t] ** 0.5, (1 - left[t]) ** 0.5))
    return table.run()


def _timesteps(config: SamplerConfig, steps: int, ratio: int) -> tuple[list[int], list[int]]:
    """Those of the Runge-Kutta start, perhaps none, and the rest."""
    rising = timesteps(config, steps)[::-1]
    if config.skip_prk_steps:
        twice = np.concatenate([rising[:-1], rising[-2:-1], rising[-1:]])
        return [], twice[::-1].tolist()
    if steps < ORDER:
        raise ConfigError(f"PNDM with Runge-Kutta needs at least {ORDER} steps, got {steps}")
    stages = rising[-ORDER:].repeat(2) + np.tile(np.array([0, ratio // 2]), ORDER)
    return stages[:-1].repeat(2)[1:-1][::-1].tolist(), rising[:-3][::-1].tolist()
