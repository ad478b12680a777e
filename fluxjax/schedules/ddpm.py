"""DDPM (Ho et al. 2020). Source: diffusers `DDPMScheduler`."""

from __future__ import annotations

import math

from fluxjax.config import ConfigError
from fluxjax.config.sampler import SamplerConfig
from fluxjax.schedules.noise_table import alphas_cumprod
from fluxjax.schedules.prediction import picture_and_noise
from fluxjax.schedules.spacing import timesteps
from fluxjax.schedules.step_table import NOISE, SAMPLE, Run, StepTable, X

LEAST_VARIANCE = 1e-20


def ddpm(config: SamplerConfig, steps: int, first: int = 0) -> Run:
    """The variance is the posterior's (small), that of the forward process (large), or predicted
    between the two (learned_range). Nothing is drawn at timestep 0."""
    if config.variance_type == "learned":
        raise ConfigError("variance_type='learned' is not supported; learned_range is")
    left, table = alphas_cumprod(config).tolist(), StepTable(config)
    times = timesteps(config, steps)
    for i in range(first, steps):
        t = times[i]
        a, b = left[t], left[times[i + 1]] if i + 1 < steps else 1.0
        added = 1 - a / b
        picture, _ = picture_and_noise(config.prediction_type, a**0.5, (1 - a) ** 0.5)
        x = b**0.5 * added / (1 - a) * table.clamped(picture)
        x = x + (a / b) ** 0.5 * (1 - b) / (1 - a) * X
        small, learned = max((1 - b) / (1 - a) * added, LEAST_VARIANCE), None
        if config.variance_type == "learned_range":
            learned = math.log(small), math.log(added)
            deviation = 1.0
        else:
            deviation = (added if config.variance_type == "fixed_large" else small) ** 0.5
        x = x + (deviation if t > 0 else 0.0) * NOISE
        table.add(
            t, {SAMPLE: x}, (a**0.5, (1 - a) ** 0.5), draws=bool(t > 0), log_variances=learned
        )
    return table.run()
