"""DPM-Solver and DPM-Solver++, orders 1 to 3, and their stochastic forms (Lu et al. 2022).

Source: diffusers `DPMSolverMultistepScheduler`.
"""

from __future__ import annotations

import numpy as np

from fluxjax.config import ConfigError
from fluxjax.config.sampler import SamplerConfig
from fluxjax.schedules.prediction import picture_and_noise
from fluxjax.schedules.sigma_levels import multistep_levels
from fluxjax.schedules.step_table import (
    FIRST,
    H1,
    H2,
    NOISE,
    SAMPLE,
    SECOND,
    Latent,
    Run,
    StepTable,
    X,
)

FEW_STEPS = 15
"""Below, `lower_order_final` ends with lower orders."""


def dpm_solver(
    config: SamplerConfig, steps: int, first: int = 0, *, mu: float | None = None
) -> Run:
    """`mu`: see `fluxjax.schedules.sigma_levels.flow_levels`."""
    kind = config.algorithm_type or "dpmsolver++"
    if "++" not in kind and kind != "deis" and config.final_sigmas_type == "zero":
        raise ConfigError(f"algorithm_type={kind!r} needs final_sigmas_type='sigma_min'")
    sigmas, times = multistep_levels(config, steps, mu)
    table, order = StepTable(config), config.solver_order or 2
    for i in range(first, steps):
        signal, level = signal_and_level(config, sigmas[i])
        picture, noise = picture_and_noise(config.prediction_type, signal, level)
        if table.clamps:
            picture = table.clamped(picture)
            noise = (X - signal * picture) / level
        held = picture if "++" in kind or kind == "deis" else noise
        now = min(order, i - first + 1, _most(config, i, steps))
        x = _step(config, sigmas[max(i - 2, 0) : i + 2], held, now)
        rows = {SAMPLE: x, FIRST: held, SECOND: H1}
        table.add(times[i], rows, (signal, level), draws=kind.startswith("sde"))
    return table.run()


def signal_and_level(config: SamplerConfig, sigma: float) -> tuple[float, float]:
    """How much of the picture and of the noise there is."""
    if config.use_flow_sigmas:
        return 1 - sigma, sigma
    signal = (sigma**2 + 1) ** -0.5
    return signal, sigma * signal


def log_ratio(config: SamplerConfig, sigma: float) -> np.float64:
    """ln(signal / level), in which the solvers count; numpy's number, as a step of length zero,
    between levels that are equal, divides by zero."""
    signal, level = signal_and_level(config, sigma)
    return np.log(signal) - np.log(level)


def _most(config: SamplerConfig, i: int, steps: int) -> int:
    few = bool(config.lower_order_final) and steps < FEW_STEPS
    if i == steps - 1 and (config.euler_at_final or few or config.final_sigmas_type == "zero"):
        return 1
    return 2 if i == steps - 2 and few else 3


def _step(config: SamplerConfig, sigmas: np.ndarray, held: Latent, order: int) -> Latent:
    """From sigmas[-2] to sigmas[-1]; those before are the history's."""
    kind, heun = config.algorithm_type or "dpmsolver++", config.solver_type == "heun"
    (signal, level), (signal_0, level_0) = (signal_and_level(config, s) for s in sigmas[:-3:-1])
    logs = [log_ratio(config, s) for s in sigmas]
    h = logs[-1] - logs[-2]
    d1 = d2 = 0 * X
    if order > 1:
        r0 = (logs[-2] - logs[-3]) / h
        d1 = (held - H1) / r0
    if order > 2:
        r1 = (logs[-3] - logs[-4]) / h
        older = (H1 - H2) / r1
        d1, d2 = d1 + r0 / (r0 + r1) * (d1 - older), (d1 - older) / (r0 + r1)
    # Each solver: x's share, then with what the held output, its first and second differences and
    # the noise are multiplied. Order 3 has its own first difference; else midpoint or heun decides.
    full = order == 3 or (heun and order == 2)
    if kind in ("dpmsolver++", "deis"):
        e = np.exp(-h) - 1
        x = level / level_0 * X - signal * e * held
        x = x + (signal * (e / h + 1) if full else -0.5 * signal * e) * d1
        return x if order < 3 else x - signal * ((e + h) / h**2 - 0.5) * d2
    if kind == "dpmsolver":
        e = np.exp(h) - 1
        x = signal / signal_0 * X - level * e * held
        x = x - (level * (e / h - 1) if full else 0.5 * level * e) * d1
        return x if order < 3 else x - level * ((e - h) / h**2 - 0.5) * d2
    if kind == "sde-dpmsolver++":
        e = 1 - np.exp(-2 * h)
        x = level / level_0 * np.exp(-h) * X + signal * e * held + level * e**0.5 * NOISE
        x = x + (signal * (e / (-2 * h) + 1) if full else 0.5 * signal * e) * d1
        return x if order < 3 else x + signal * ((e - 2 * h) / (2 * h) ** 2 - 0.5) * d2
    if order > 2:
        raise ConfigError("algorithm_type='sde-dpmsolver' has no solver_order 3")
    e = np.exp(h) - 1
    x = signal / signal_0 * X - 2 * level * e * held
    x = x + level * (np.exp(2 * h) - 1) ** 0.5 * NOISE
    return x - (2 * level * (e / h - 1) if full else level * e) * d1
