"""Noise levels spaced by a rule of their own instead of by timesteps.

Source: Karras et al. 2022, eq. 5; Lee et al. 2024 (beta); Lu et al. 2022; diffusers `_convert_to`.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from fluxjax.config.choices import Respacing

RHO = 7.0
BETA_SHAPE = 0.6


def respaced(
    kind: Respacing, largest: float, smallest: float, steps: int
) -> Float[np.ndarray, "steps"]:
    """`steps` levels from `largest` down to `smallest`, float64."""
    part = np.linspace(0, 1, steps)
    if kind == "karras":
        top, bottom = largest ** (1 / RHO), smallest ** (1 / RHO)
        return (top + part * (bottom - top)) ** RHO
    if kind == "beta":
        from scipy.special import betaincinv

        share = betaincinv(BETA_SHAPE, BETA_SHAPE, 1 - part)
        return smallest + share * (largest - smallest)
    top, bottom = math.log(largest), math.log(smallest)
    if kind == "lu":
        return np.exp(top + part * (bottom - top))
    return np.exp(np.linspace(top, bottom, steps))


def timesteps_of(
    levels: Float[np.ndarray, "steps"], table: Float[np.ndarray, "timesteps"]
) -> Float[np.ndarray, "steps"]:
    """Where in the table of sigmas, which rises, `levels` lie, interpolated in their logarithm."""
    known, wanted = np.log(table), np.log(np.maximum(levels, 1e-10))
    low = np.clip(np.searchsorted(known, wanted, side="right") - 1, 0, len(known) - 2)
    weight = np.clip((known[low] - wanted) / (known[low] - known[low + 1]), 0, 1)
    return (1 - weight) * low + weight * (low + 1)
