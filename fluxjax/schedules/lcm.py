"""Latent consistency models (Luo et al. 2023). Source: diffusers `LCMScheduler`."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from fluxjax.config import ConfigError
from fluxjax.config.sampler import SamplerConfig
from fluxjax.schedules.noise_table import alphas_cumprod
from fluxjax.schedules.prediction import picture_and_noise
from fluxjax.schedules.step_table import NOISE, SAMPLE, Run, StepTable, X

SIGMA_DATA = 0.5


def lcm(config: SamplerConfig, steps: int, first: int = 0, strength: float = 1.0) -> Run:
    """Each step predicts the picture and adds new noise to it, but for the last. With a `strength`
    below 1 all steps are within that part of the timesteps."""
    left, table = alphas_cumprod(config).tolist(), StepTable(config)
    times = _timesteps(config, steps, len(left), strength)
    for i in range(first, steps):
        t, last = times[i], i == steps - 1
        a = left[t]
        picture, _ = picture_and_noise(config.prediction_type, a**0.5, (1 - a) ** 0.5)
        scaled = float(t) * (config.timestep_scaling or 10.0)
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5
        x = out * table.clamped(picture) + skip * X
        if not last:
            b = left[times[i + 1]]
            x = b**0.5 * x + (1 - b) ** 0.5 * NOISE
        table.add(t, {SAMPLE: x}, (a**0.5, (1 - a) ** 0.5), draws=not last)
    return table.run()


def _timesteps(
    config: SamplerConfig, steps: int, trained: int, strength: float
) -> Int[np.ndarray, "steps"]:
    origin = config.original_inference_steps or 50
    if steps > origin:
        raise ConfigError(f"LCM was distilled to {origin} steps: {steps} cannot be drawn with")
    left = int(origin * strength)
    if steps > left:
        raise ConfigError(
            f"a strength of {strength:g} leaves {left} of the {origin} steps that LCM was "
            f"distilled to: {steps} cannot be drawn with"
        )
    found = np.arange(1, left + 1) * (trained // origin) - 1
    return found[::-1][np.floor(np.linspace(0, left, steps, endpoint=False)).astype(int)]
