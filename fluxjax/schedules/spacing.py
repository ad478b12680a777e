"""Which of the timesteps that a model was trained with a run visits, the noisiest first.

Source: diffusers' `set_timesteps`; Lin et al. 2023, table 2, names the three ways.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Num

from fluxjax.config import ConfigError
from fluxjax.config.sampler import SamplerConfig


def timesteps(config: SamplerConfig, steps: int) -> Num[np.ndarray, "steps"]:
    """Of DDPM, DDIM and PNDM (whole numbers), and of Euler and Heun, whose linspace is not rounded.

    `config` is complete. Raises ConfigError for timesteps that the model does not have.
    """
    last = _trained(config) - 1
    if config.timestep_spacing == "linspace":
        if config.sampler in FRACTIONAL:
            return np.linspace(0, last, steps, dtype=np.float32)[::-1]
        return np.linspace(0, last, steps).round()[::-1].astype(np.int64)
    if config.timestep_spacing == "leading":
        return _leading(config, steps, (last + 1) // steps)
    return _trailing(last + 1, steps, last + 1)


def multistep_timesteps(config: SamplerConfig, steps: int) -> Num[np.ndarray, "steps"]:
    """Of DPM-Solver and UniPC: as if there were one step more, without the cleanest."""
    from fluxjax.schedules.noise_table import sigmas

    trained = last = _trained(config)
    if config.lambda_min_clipped is not None:
        rising = -np.log(sigmas(config))[::-1]
        last = trained - int(np.searchsorted(rising, config.lambda_min_clipped))
    if config.timestep_spacing == "linspace":
        return np.linspace(0, last - 1, steps + 1).round()[::-1][:-1].astype(np.int64)
    if config.timestep_spacing == "leading":
        return _leading(config, steps + 1, last // (steps + 1))[:-1]
    return _trailing(trained, steps, last)


FRACTIONAL = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
)


def _trained(config: SamplerConfig) -> int:
    assert config.num_train_timesteps is not None, "a completed configuration"
    return config.num_train_timesteps


def _leading(config: SamplerConfig, steps: int, ratio: int) -> Num[np.ndarray, "steps"]:
    found = (np.arange(steps) * ratio)[::-1] + (config.steps_offset or 0)
    if found[0] >= _trained(config):
        raise ConfigError(
            f"{steps} steps with leading spacing and a steps_offset of {config.steps_offset} begin "
            f"at timestep {found[0]}, and the model was trained with 0 to {_trained(config) - 1}"
        )
    return found


def _trailing(trained: int, steps: int, last: int) -> Num[np.ndarray, "steps"]:
    # The range, counted in floats, has an end too many for some numbers of steps.
    return np.arange(last, 0, -trained / steps)[:steps].round().astype(np.int64) - 1
