"""UniPC: each evaluation first corrects the step that led to it (Zhao et al. 2023).

Source: diffusers `UniPCMultistepScheduler`.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from fluxjax.config.sampler import SamplerConfig
from fluxjax.schedules.dpm_solver import log_ratio, signal_and_level
from fluxjax.schedules.prediction import picture_and_noise
from fluxjax.schedules.sigma_levels import multistep_levels
from fluxjax.schedules.step_table import (
    ANCHOR,
    FIRST,
    FROM,
    H1,
    H2,
    H3,
    SAMPLE,
    SECOND,
    THIRD,
    Latent,
    Run,
    StepTable,
    X,
)


def unipc(config: SamplerConfig, steps: int, first: int = 0, *, mu: float | None = None) -> Run:
    """`mu`: see `fluxjax.schedules.sigma_levels.flow_levels`."""
    sigmas, times = multistep_levels(config, steps, mu)
    table, most = StepTable(config), config.solver_order or 2
    before = 0
    for i in range(first, steps):
        signal, level = signal_and_level(config, sigmas[i])
        picture, noise = picture_and_noise(config.prediction_type, signal, level)
        held = table.clamped(picture) if config.predict_x0 else noise
        x = X
        if i > first and i - 1 not in (config.disable_corrector or ()):
            x = _corrected(config, sigmas, i, held, before)
        before = min(most, i - first + 1, steps - i if config.lower_order_final else most)
        after = _predicted(config, sigmas, i, x, held, before)
        rows = {SAMPLE: after, ANCHOR: x, FIRST: held, SECOND: H1, THIRD: H2}
        table.add(times[i], rows, (signal, level))
    return table.run()


def _predicted(
    config: SamplerConfig, sigmas: np.ndarray, i: int, x: Latent, held: Latent, order: int
) -> Latent:
    """From sigmas[i] to the next."""
    ratios, moments, phi, b = _system(config, sigmas[i + 1], sigmas[i], sigmas[:i][::-1], order)
    slopes = [(past - held) / r for past, r in zip((H1, H2), ratios[:-1], strict=False)]
    weights = np.array([0.5])
    if order > 2:
        powers = np.vander(ratios, order, increasing=True).T
        weights = _solved(powers[:-1, :-1], moments[:-1])
    bent = sum((w * s for w, s in zip(weights, slopes, strict=False)), start=0 * X)
    return _moved(config, sigmas[i + 1], sigmas[i], x, phi, b, held, bent)


def _corrected(
    config: SamplerConfig, sigmas: np.ndarray, i: int, held: Latent, order: int
) -> Latent:
    """The step from sigmas[i - 1] again, with the output at its end known."""
    ratios, moments, phi, b = _system(
        config, sigmas[i], sigmas[i - 1], sigmas[: i - 1][::-1], order
    )
    slopes = [(past - H1) / r for past, r in zip((H2, H3), ratios[:-1], strict=False)]
    weights = np.array([0.5])
    if order > 1:
        weights = _solved(np.vander(ratios, order, increasing=True).T, moments)
    bent = sum((w * s for w, s in zip(weights[:-1], slopes, strict=False)), start=0 * X)
    bent = bent + weights[-1] * (held - H1)
    return _moved(config, sigmas[i], sigmas[i - 1], FROM, phi, b, H1, bent)


def _solved(
    matrix: Float[np.ndarray, "order order"], moments: Float[np.ndarray, "order"]
) -> Float[np.ndarray, "order"]:
    """Not finite where there is no solution, as with two levels that are equal."""
    try:
        return np.linalg.solve(matrix, moments)
    except np.linalg.LinAlgError:
        return np.full(len(moments), np.nan)


def _system(
    config: SamplerConfig, to: float, start: float, past: np.ndarray, order: int
) -> tuple[Float[np.ndarray, "order"], Float[np.ndarray, "order"], float, float]:
    """(where the past lies, the moments to be met, e^h - 1, B(h))."""
    here = log_ratio(config, start)
    h = log_ratio(config, to) - here
    ratios = np.array([(log_ratio(config, s) - here) / h for s in past[: order - 1]] + [1.0])
    signed = -h if config.predict_x0 else h
    phi = np.expm1(signed)
    b = signed if config.solver_type == "bh1" else phi
    moments, term, factorial = [], phi / signed - 1, 1
    for k in range(1, order + 1):
        moments.append(term * factorial / b)
        factorial *= k + 1
        term = term / signed - 1 / factorial
    return ratios, np.array(moments), phi, b


def _moved(
    config: SamplerConfig,
    to: float,
    start: float,
    x: Latent,
    phi: float,
    b: float,
    held: Latent,
    bent: Latent,
) -> Latent:
    (signal, level), (signal_0, level_0) = (signal_and_level(config, s) for s in (to, start))
    if config.predict_x0:
        return level / level_0 * x - signal * phi * held - signal * b * bent
    return signal / signal_0 * x - level * phi * held - level * b * bent
