"""Losses as pure functions of predictions; each returns a float32 scalar."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from fluxjax.models.autoencoder import Posterior


def autoencoder_loss(
    reconstruction: Float[Array, "b h w c"],
    image: Float[Array, "b h w c"],
    posterior: Posterior,
    *,
    kl_weight: float = 1e-4,
) -> Float[Array, ""]:
    """Mean absolute + squared error of pictures in [-1, 1], and the KL to N(0, 1) per latent.

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


def interpolate(
    latents: Float[Array, "b *shape"], noise: Float[Array, "b *shape"], t: Float[Array, "b"]
) -> Float[Array, "b *shape"]:
    """x_t = (1 - t) x_0 + t noise (rectified flow, Liu et al. 2022)."""
    t = t.reshape(t.shape + (1,) * (latents.ndim - 1))
    return (1.0 - t) * latents + t * noise


def velocity_loss(
    velocity: Float[Array, "b *shape"], target: Float[Array, "b *shape"]
) -> Float[Array, ""]:
    """Mean squared error in float32, unweighted; the target of flow matching is noise - x_0."""
    return jnp.square(velocity.astype(jnp.float32) - target.astype(jnp.float32)).mean()


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
