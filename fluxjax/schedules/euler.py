"""Euler steps through sigmas, with churn or ancestral noise (Karras et al. 2022).

Source: diffusers `EulerDiscreteScheduler`, `EulerAncestralDiscreteScheduler`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fluxjax.config.sampler import SamplerConfig
from fluxjax.schedules.prediction import gain_in_sigmas, picture_in_sigmas
from fluxjax.schedules.sigma_levels import spaced_levels
from fluxjax.schedules.step_table import NOISE, SAMPLE, Run, StepTable, X


@dataclass(frozen=True)
class Churn:
    """How much noise is added before a step, and between which sigmas."""

    amount: float = 0.0
    smallest: float = 0.0
    largest: float = float("inf")
    scale: float = 1.0


def euler(config: SamplerConfig, steps: int, first: int = 0, churn: Churn | None = None) -> Run:
    """The network does not see churn's noise: it is added after the call, as in diffusers."""
    churn = churn or Churn()
    sigmas, times = spaced_levels(config, steps)
    table, kind = StepTable(config), config.prediction_type
    for i in range(first, len(times)):
        s, after = sigmas[i], sigmas[i + 1]
        inside = churn.smallest <= s <= churn.largest
        more = min(churn.amount / steps, 2**0.5 - 1) if inside else 0.0
        hat = s * (1 + more)
        x = X + churn.scale * (hat**2 - s**2) ** 0.5 * NOISE
        x = x + (after - hat) / hat * (x - picture_in_sigmas(kind, s, x, hat))
        table.add(
            times[i],
            {SAMPLE: x},
            (1.0, s),
            scale=(s**2 + 1) ** -0.5,
            gain=gain_in_sigmas(kind, hat if kind == "epsilon" else s),
            draws=more > 0,
        )
    return table.run(scale=initial_scale(config, sigmas.max()))


def euler_ancestral(config: SamplerConfig, steps: int, first: int = 0) -> Run:
    """Each step goes too far and adds the noise back; it draws on every step, the last included."""
    sigmas, times = spaced_levels(config, steps)
    table, kind = StepTable(config), config.prediction_type
    for i in range(first, steps):
        s, after = sigmas[i], sigmas[i + 1]
        up = (after**2 * (s**2 - after**2) / s**2) ** 0.5
        down = (after**2 - up**2) ** 0.5
        x = X + (down - s) / s * (X - picture_in_sigmas(kind, s)) + up * NOISE
        gain = gain_in_sigmas(kind, s)
        scale = (s**2 + 1) ** -0.5
        table.add(times[i], {SAMPLE: x}, (1.0, s), scale=scale, gain=gain, draws=True)
    return table.run(scale=initial_scale(config, sigmas.max()))


def initial_scale(config: SamplerConfig, largest: float) -> float:
    """Leading spacing begins below the noisiest level, where something of a picture is left."""
    if config.timestep_spacing == "leading":
        return float((largest**2 + 1) ** 0.5)
    return float(largest)
