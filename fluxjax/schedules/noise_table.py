"""How much of a picture is left at each of the timesteps a model was trained with.

Bit for bit PyTorch's float32 tables, without PyTorch: `torch.linspace` rounds each value once,
counted from the nearer end; `torch.cumprod` adds up in float64 and rounds each value.
Source: diffusers' schedulers; Lin et al. 2023 (zero terminal SNR).
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from fluxjax.config.sampler import SamplerConfig

ALMOST_NOISE = np.float32(2.0**-24)
MOST_BETA = 0.999


def alphas_cumprod(config: SamplerConfig) -> Float[np.ndarray, "timesteps"]:
    """The share of the picture's variance at each timestep, float32; `config` is complete."""
    values = betas(config)
    if not config.rescale_betas_zero_snr:
        return _cumulative(values)
    table = _cumulative(zero_terminal_snr(values))
    if config.final_sigmas_type or config.sampler == "EulerAncestralDiscreteScheduler":
        table[-1] = ALMOST_NOISE  # samplers that count in sigmas need one that is finite
    return table


def sigmas(config: SamplerConfig) -> Float[np.ndarray, "timesteps"]:
    """Noise per picture, sqrt((1 - a) / a), float32."""
    a = alphas_cumprod(config)
    return np.sqrt((np.float32(1) - a) / a)


def betas(config: SamplerConfig) -> Float[np.ndarray, "timesteps"]:
    """The variance that each timestep adds, before `zero_terminal_snr`."""
    if config.trained_betas is not None:
        return np.asarray(config.trained_betas, np.float32)
    count = config.num_train_timesteps
    start, end = config.beta_start, config.beta_end
    assert count is not None and start is not None and end is not None, "a completed configuration"
    if config.beta_schedule == "linear":
        return _linspace(start, end, count)
    if config.beta_schedule == "scaled_linear":
        return _linspace(start**0.5, end**0.5, count) ** 2

    def left(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    added = [min(1 - left((i + 1) / count) / left(i / count), MOST_BETA) for i in range(count)]
    return np.asarray(added, np.float32)


def _cumulative(betas: Float[np.ndarray, "timesteps"]) -> Float[np.ndarray, "timesteps"]:
    return np.cumprod((np.float32(1) - betas).astype(np.float64)).astype(np.float32)


def zero_terminal_snr(betas: Float[np.ndarray, "timesteps"]) -> Float[np.ndarray, "timesteps"]:
    """Betas whose last timestep leaves nothing of the picture; the first stays as it is."""
    root = np.sqrt(_cumulative(betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    left = root**2
    return np.float32(1) - np.concatenate([left[:1], left[1:] / left[:-1]])


def _linspace(start: float, end: float, count: int) -> Float[np.ndarray, "count"]:
    first, last = np.float32(start), np.float32(end)
    step = np.float64(np.float32((last - first) / np.float32(count - 1)))
    i = np.arange(count)
    rising = np.float64(first) + step * i
    falling = np.float64(last) - step * (count - 1 - i)
    return np.where(i < count // 2, rising, falling).astype(np.float32)
