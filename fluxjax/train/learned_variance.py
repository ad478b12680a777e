"""The part of the loss that teaches a diffusion model the variance of its steps.

Source: Nichol and Dhariwal 2021, Improved denoising diffusion probabilistic models, as in OpenAI's
`gaussian_diffusion.py`, which PixArt is trained with: the mean that the predicted noise leads to is
fixed here, and learns from the squared error alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fluxjax.families.noise_path import NoisePath

_PIXEL = 1.0 / 255.0  # half the distance of two values of a byte in [-1, 1]


class _Step(NamedTuple):
    """Of the step from each timestep to the one before, given the clean picture: its mean is
    `picture` times that and `state` times the noisy one."""

    picture: Float[np.ndarray, " timesteps"]
    state: Float[np.ndarray, " timesteps"]
    least: Float[np.ndarray, " timesteps"]
    """Logarithm of its variance, which is the least that can be right."""
    most: Float[np.ndarray, " timesteps"]
    """Logarithm of beta, the largest."""


def _steps(path: NoisePath) -> _Step:
    left = path.table.astype(np.float64)  # pyright: ignore[reportAttributeAccessIssue]
    before = np.concatenate([[1.0], left[:-1]])
    beta = 1.0 - left / before
    variance = beta * (1.0 - before) / (1.0 - left)
    variance[0] = variance[1]  # the last step adds nothing, and 0 has no logarithm
    picture = beta * np.sqrt(before) / (1.0 - left)
    state = (1.0 - before) * np.sqrt(left / before) / (1.0 - left)
    return _Step(picture, state, np.log(variance), np.log(beta))


def variational_bound(
    path: NoisePath,
    predicted: Float[Array, "b *shape"],
    values: Float[Array, "b *shape"],
    latents: Float[Array, "b *shape"],
    x: Float[Array, "b *shape"],
    t: Float[Array, " b"],
) -> Float[Array, " b"]:
    """Bits per number of each row: how far the step that the network takes is from the true one.

    `predicted`: noise, v or the picture, as the path has it, of which no gradient is taken;
    `values`: -1 (the least variance) to 1 (the largest), between their logarithms; `x`: the noisy
    latents.
    """
    predicted = jax.lax.stop_gradient(predicted).astype(jnp.float32)
    values = values.astype(jnp.float32)
    index = t.astype(jnp.int32)

    def row(table: np.ndarray) -> Array:
        return jnp.asarray(table, jnp.float32)[index].reshape(-1, *[1] * (x.ndim - 1))

    picture, state, least, most = map(row, _steps(path))
    signal, level = (part.reshape(least.shape) for part in path.state(t))
    said = predicted
    if path.prediction == "epsilon":
        said = (x - level * predicted) / signal
    elif path.prediction == "v_prediction":
        said = signal * x - level * predicted
    mean, true = picture * said + state * x, picture * latents + state * x
    log = (values + 1.0) / 2.0 * (most - least) + least
    apart = 0.5 * (
        log - least - 1.0 + jnp.exp(least - log) + jnp.square(true - mean) * jnp.exp(-log)
    )
    nats = jnp.where(index.reshape(least.shape) == 0, -_log_likelihood(latents, mean, log), apart)
    return nats.mean(axis=range(1, x.ndim)) / math.log(2.0)


def _log_likelihood(
    latents: Float[Array, "b *shape"], mean: Float[Array, "b *shape"], log: Float[Array, "b *shape"]
) -> Float[Array, "b *shape"]:
    """That of a normal distribution for the byte that each number lies in."""
    scale, centred = jnp.exp(-0.5 * log), latents - mean
    above, below = _cumulative(scale * (centred + _PIXEL)), _cumulative(scale * (centred - _PIXEL))
    share = jnp.where(latents < -0.999, above, above - below)
    share = jnp.where(latents > 0.999, 1.0 - below, share)
    return jnp.log(jnp.maximum(share, 1e-12))


def _cumulative(x: Array) -> Array:
    """The normal distribution's, in Page's approximation, as the published code has it."""
    return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
