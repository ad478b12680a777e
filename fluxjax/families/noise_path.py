"""How pictures become noise while a network learns, and what it learns to say of that.

At every time x = signal picture + level noise, and what is predicted is a sum of the two as well.
Source: Ho et al. 2020 (noise); Salimans and Ho 2022 (v); Liu et al. 2022 (rectified flow).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fluxjax.config.base import require
from fluxjax.config.sampler import Prediction, SamplerConfig
from fluxjax.schedules.noise_table import alphas_cumprod

AnyArray = Array | np.ndarray


class Mixture(NamedTuple):
    """So much of a picture and so much noise, a number of each for a row."""

    picture: Float[AnyArray, "#b"]
    noise: Float[AnyArray, "#b"]

    def of(self, picture: Float[AnyArray, "b *shape"], noise: Float[AnyArray, "b *shape"]) -> Any:
        """Of the type of what is given."""
        axes = (-1,) + (1,) * (picture.ndim - 1)
        return self.picture.reshape(axes) * picture + self.noise.reshape(axes) * noise


@dataclass(frozen=True)
class FlowPath:
    """A straight line from the picture (time 0) to noise (time 1); the velocity, noise - picture,
    is predicted."""

    time_scale: float = 1.0
    """The network is told the time times this."""
    least: float = 0.0
    """How much noise there is at time 0, in what the network sees and in what it predicts."""

    density = "flux_shift"
    is_flow = True
    learns_variance = False
    prediction = "flow_prediction"

    def times(self, t: Float[Array, " b"]) -> Float[Array, " b"]:
        """What is learnt at, of times in (0, 1)."""
        return t

    def told(self, t: Float[Array, " b"]) -> Float[Array, " b"]:
        """What the network is told of them."""
        return t if self.time_scale == 1.0 else self.time_scale * t

    def state(self, t: Float[AnyArray, "#b"]) -> Mixture:
        picture = 1.0 - t
        return Mixture(picture, 1.0 - (1.0 - self.least) * picture if self.least else t)

    def target(self, t: Float[AnyArray, "#b"]) -> Mixture:
        return Mixture(-jnp.ones_like(t), (1.0 - self.least) * jnp.ones_like(t))


FLOW = FlowPath()
OPEN_SORA_FLOW = FlowPath(least=1e-5)
"""Source: hpcaitech/Open-Sora `scripts/diffusion/train.py`, sigma_min."""


@dataclass(frozen=True)
class DiffusionPath:
    """The timesteps of a table of betas, each of them a time; noise, v or the picture itself is
    predicted."""

    scheduler: SamplerConfig
    """Complete; its betas and its prediction_type count."""
    learns_variance: bool = False
    """Whether the second half of the network's channels says how large each step's variance is."""

    density = "uniform"
    is_flow = False

    @classmethod
    def of(cls, scheduler: SamplerConfig) -> DiffusionPath:
        """That of a model which `scheduler` samples. Raises ConfigError for a flow's."""
        require(not scheduler.is_flow, f"{scheduler.sampler} samples a flow")
        # Of samplers some say nothing of what training knows.
        complete = replace(scheduler, sampler="DDPMScheduler").complete()
        no_signal = complete.rescale_betas_zero_snr and complete.prediction_type == "epsilon"
        require(
            not no_signal,
            "where the last timestep is noise alone, the noise in it says nothing: zero SNR needs "
            "v_prediction",
        )
        return cls(complete)

    @property
    def prediction(self) -> Prediction:
        assert self.scheduler.prediction_type is not None
        return self.scheduler.prediction_type

    @property
    def table(self) -> Float[np.ndarray, " timesteps"]:
        """The share of the picture's variance at each timestep."""
        return alphas_cumprod(self.scheduler)

    def times(self, t: Float[Array, " b"]) -> Float[Array, " b"]:
        """The timesteps, 0 to 999, that times in (0, 1) lie in."""
        count = len(self.table)
        return jnp.minimum(jnp.floor(t * count), count - 1)

    def told(self, t: Float[Array, " b"]) -> Float[Array, " b"]:
        return t

    def state(self, t: Float[Array, " b"]) -> Mixture:
        left = jnp.asarray(self.table)[t.astype(jnp.int32)]
        return Mixture(jnp.sqrt(left), jnp.sqrt(1.0 - left))

    def target(self, t: Float[Array, " b"]) -> Mixture:
        signal, level = self.state(t)
        if self.prediction == "v_prediction":
            return Mixture(-level, signal)
        zero, one = jnp.zeros_like(signal), jnp.ones_like(signal)
        return Mixture(one, zero) if self.prediction == "sample" else Mixture(zero, one)


NoisePath = FlowPath | DiffusionPath
