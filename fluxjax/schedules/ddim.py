"""DDIM (Song et al. 2020). Source: diffusers `DDIMScheduler`."""

from __future__ import annotations

from fluxjax.config.sampler import SamplerConfig
from fluxjax.schedules.noise_table import alphas_cumprod
from fluxjax.schedules.prediction import picture_and_noise
from fluxjax.schedules.spacing import timesteps
from fluxjax.schedules.step_table import NOISE, SAMPLE, Run, StepTable, X


def ddim(
    config: SamplerConfig,
    steps: int,
    first: int = 0,
    *,
    eta: float = 0.0,
    noise_of_clamped: bool = False,
) -> Run:
    """`eta` 0 draws nothing, 1 is DDPM's variance. The timestep before is always T // steps away,
    wherever the next one lies. `noise_of_clamped`: the noise is that of the clamped picture."""
    left, table = alphas_cumprod(config).tolist(), StepTable(config)
    final = 1.0 if config.set_alpha_to_one else left[0]
    for t in timesteps(config, steps)[first:]:
        before = t - len(left) // steps
        a, b = left[t], left[before] if before >= 0 else final
        signal, level = a**0.5, (1 - a) ** 0.5
        picture, noise = picture_and_noise(config.prediction_type, signal, level)
        picture = table.clamped(picture)
        if noise_of_clamped:
            noise = (X - signal * picture) / level
        deviation = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        x = b**0.5 * picture + max(1 - b - deviation**2, 0.0) ** 0.5 * noise + deviation * NOISE
        table.add(t, {SAMPLE: x}, (signal, level), draws=eta > 0)
    return table.run()
