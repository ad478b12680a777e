"""Heun's method: two evaluations a step, the last step is Euler's (Karras et al. 2022).

Source: diffusers `HeunDiscreteScheduler`, `FlowMatchHeunDiscreteScheduler`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fluxjax.config.sampler import SamplerConfig
from fluxjax.schedules.euler import initial_scale
from fluxjax.schedules.prediction import picture_and_noise, picture_in_sigmas
from fluxjax.schedules.sigma_levels import Levels, flow_levels, spaced_levels
from fluxjax.schedules.step_table import (
    ANCHOR,
    FIRST,
    FROM,
    H1,
    SAMPLE,
    Latent,
    Run,
    StepTable,
    X,
)

ORDER = 2


def heun(config: SamplerConfig, steps: int, first: int = 0) -> Run:
    """`first` counts evaluations, two a step."""
    levels, table = spaced_levels(config, steps), StepTable(config)

    def slope(s: float) -> Latent:
        return (X - table.clamped(picture_in_sigmas(config.prediction_type, s))) / s

    def level(s: float) -> tuple[float, float]:
        return 1.0, s

    _two_each(table, levels, first, slope, level, lambda s: (s**2 + 1) ** -0.5)
    return table.run(scale=initial_scale(config, levels.sigmas.max()), order=ORDER)


def flow_heun(
    config: SamplerConfig,
    steps: int,
    first: int = 0,
    *,
    mu: float | None = None,
    own: Sequence[float] | None = None,
) -> Run:
    """On a flow; see `flow_levels` for `mu` and `own`."""
    levels, table = flow_levels(config, steps, mu, own), StepTable(config)

    def slope(s: float) -> Latent:
        return (X - picture_and_noise("flow_prediction", 1 - s, s)[0]) / s

    _two_each(table, levels, first, slope, lambda s: (1 - s, s), lambda s: 1.0)
    return table.run(order=ORDER)


def _two_each(
    table: StepTable,
    levels: Levels,
    first: int,
    slope: Callable[[float], Latent],
    level: Callable[[float], tuple[float, float]],
    scale: Callable[[float], float],
) -> None:
    sigmas, times = levels
    for i in range(first // ORDER, len(times)):
        s, after = sigmas[i], sigmas[i + 1]
        begun = slope(s)
        rows = {SAMPLE: X + (after - s) * begun, ANCHOR: X, FIRST: begun}
        table.add(times[i], rows, level(s), scale=scale(s))
        if i + 1 < len(times):
            x = FROM + (after - s) * (H1 + slope(after)) / 2
            table.add(times[i + 1], {SAMPLE: x}, level(after), scale=scale(after))
