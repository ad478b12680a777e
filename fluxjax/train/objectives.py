"""Losses as pure functions of predictions; each returns a float32 scalar."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from fluxjax.families.noise_path import NoisePath
from fluxjax.models.autoencoder import Posterior
from fluxjax.train.settings import Objective, Weight


def autoencoder_loss(
    reconstruction: Float[Array, "b *shape c"],
    image: Float[Array, "b *shape c"],
    posterior: Posterior,
    *,
    kl_weight: float = 1e-4,
) -> Float[Array, ""]:
    """Mean absolute + squared error of pictures or clips in [-1, 1], and the KL to N(0, 1).

    Source: Kingma & Welling 2013, appendix B; the sum of both errors keeps edges sharp (L1) and
    large errors rare (L2).
    """
    error = (reconstruction - image).astype(jnp.float32)
    mean, logvar = posterior.mean.astype(jnp.float32), posterior.logvar.astype(jnp.float32)
    divergence = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
    return jnp.abs(error).mean() + 2.0 * jnp.square(error).mean() + kl_weight * divergence.mean()


def shift_times(t: Float[Array, "*b"], mu: float | Array) -> Float[Array, "*b"]:
    """e^mu / (e^mu + 1/t - 1): the resolution-dependent shift that sampling uses too."""
    return jnp.exp(mu) * t / (jnp.exp(mu) * t + 1.0 - t)


def sample_times(key: PRNGKeyArray, batch: int, mu: float | Array) -> Float[Array, "b"]:
    """Timesteps with the density `flux_shift`: sigmoid(N(0, 1)), shifted by mu."""
    return shift_times(jax.nn.sigmoid(jax.random.normal(key, (batch,))), mu)


def learnt_times(
    objective: Objective, path: NoisePath, uniform: Float[Array, " b"], mu: float | Array
) -> Float[Array, " b"]:
    """Times of a path, at the quantiles `uniform` of the objective's density or of its own."""
    if objective.density == "auto":
        objective = replace(objective, density=path.density)
    return path.times(density_times(objective, uniform, mu))


def density_times(
    objective: Objective, uniform: Float[Array, "*b"], mu: float | Array
) -> Float[Array, "*b"]:
    """Times of the objective's density, which is not auto, at the quantiles `uniform`, in (0, 1).

    Source: Esser et al. 2024 (SD3), section 3.1 for logit_normal and mode; kohya's sd-scripts for
    the names sigmoid, shift and flux_shift.
    """
    # 2^-24: the smallest step of a float32 uniform, so that no quantile is 0 or 1.
    u = jnp.clip(uniform, 2.0**-24, 1.0 - 2.0**-24)
    if objective.density == "uniform":
        return u
    if objective.density == "mode":
        t = 1.0 - u - objective.mode_scale * (jnp.square(jnp.cos(math.pi / 2 * u)) - 1.0 + u)
        return jnp.clip(t, 2.0**-24, 1.0 - 2.0**-24)
    normal = jax.scipy.special.ndtri(u)
    if objective.density == "logit_normal":
        return jax.nn.sigmoid(objective.mean + objective.std * normal)
    t = jax.nn.sigmoid(normal)
    if objective.density == "flux_shift":
        return shift_times(t, mu)
    return shift_times(t, math.log(objective.shift)) if objective.density == "shift" else t


def time_weights(weight: Weight, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """What each row's squared error is multiplied with. Source: as `density_times`."""
    if weight == "sigma_sqrt":
        return t**-2.0
    if weight == "cosmap":
        return 2.0 / (math.pi * (1.0 - 2.0 * t + 2.0 * jnp.square(t)))
    return jnp.ones_like(t)


def snr_weights(path: NoisePath, t: Float[Array, " b"], most: float) -> Float[Array, " b"]:
    """What each row's squared error is multiplied with, so that as an error of the picture it
    counts its signal-to-noise ratio, but no more than `most`.

    Source: Hang et al. 2023 (Min-SNR), and its form for v as in diffusers' training examples.
    """
    signal, level = path.state(t)
    ratio = jnp.square(signal / level)
    counted = jnp.minimum(ratio, most)
    if path.prediction == "v_prediction":
        return counted / (ratio + 1.0)
    return counted if path.prediction == "sample" else counted / ratio


def debiased_weights(path: NoisePath, t: Float[Array, " b"]) -> Float[Array, " b"]:
    """What each row's squared error is multiplied with, so that as an error of the picture it
    counts the root of its signal-to-noise ratio: mostly noise counts more than by Min-SNR, and
    there the layout is decided. Ratios are taken within 0.001 and 1000.

    Source: Yu et al. 2024 (debiased estimation), and its form for v as in kohya's sd-scripts.
    """
    signal, level = path.state(t)
    ratio = jnp.clip(jnp.square(signal / level), 1e-3, 1e3)
    if path.prediction == "v_prediction":
        return 1 / (ratio + 1.0)
    return jnp.sqrt(ratio) if path.prediction == "sample" else 1 / jnp.sqrt(ratio)


def squared_error(
    predicted: Float[Array, "b *shape"],
    target: Float[Array, "b *shape"],
    weights: Float[Array, "b *#shape"] | None = None,
) -> Float[Array, ""]:
    """Mean squared error in float32, each times its weight."""
    error = jnp.square(predicted.astype(jnp.float32) - target.astype(jnp.float32))
    return (error if weights is None else weights * error).mean()


def guided_velocity(
    conditional: Float[Array, "b *shape"],
    unconditional: Float[Array, "b *shape"],
    scale: Float[Array, "b"],
) -> Float[Array, "b *shape"]:
    """Classifier-free guidance: what a guidance-distilled student learns to say in one pass.

    Source: Meng et al. 2022, On distillation of guided diffusion models, stage one.
    """
    scale = scale.reshape(scale.shape + (1,) * (conditional.ndim - 1))
    return unconditional + scale * (conditional - unconditional)
