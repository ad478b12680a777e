"""Trains a KL autoencoder on drawn scenes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from fluxjax.config import AutoencoderConfig
from fluxjax.models.autoencoder import Autoencoder
from fluxjax.train import loop
from fluxjax.train.objectives import autoencoder_loss
from fluxjax.train.scenes import render, sample_scenes
from fluxjax.train.step import Tree, init_state, make_step, muon_optimizer


@dataclass(frozen=True, kw_only=True)
class AutoencoderStage:
    """Whole pictures, small ones first (cheaper), then at full size while the rate decays."""

    steps: int = 5000
    small_steps: int = 3000
    small_size: int = 64
    small_batch: int = 12
    size: int = 96
    batch: int = 8
    learning_rate: float = 5e-3
    kl_weight: float = 1e-4
    ema_decay: float = 0.998
    seed: int = 1


def reconstruct(model: Autoencoder, params: Tree, images: jax.Array) -> jax.Array:
    """Through the posterior mean and back, clamped to [-1, 1]."""
    return jnp.clip(model.apply({"params": params}, images), -1.0, 1.0)


def psnr(reconstruction: jax.Array, images: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB, pictures in [-1, 1], averaged over pictures."""
    return (10 * jnp.log10(4.0 / jnp.square(reconstruction - images).mean((1, 2, 3)))).mean()


def latent_statistics(model: Autoencoder, params: Tree, images: jax.Array) -> tuple[float, float]:
    """(shift, scale) that give the latents of `images` mean 0 and standard deviation 1."""
    latents = model.apply({"params": params}, images, method=model.encode).mean
    return float(latents.mean()), float(1.0 / latents.std())


def train_autoencoder(config: AutoencoderConfig, stage: AutoencoderStage, folder: Path) -> Tree:
    """Returns the averaged (EMA) parameters; checkpoints and metrics lie in `folder`."""
    model = Autoencoder(config)
    blank = jnp.zeros((1, stage.small_size, stage.small_size, 3))
    params = jax.jit(model.init)(jax.random.key(stage.seed), blank)["params"]
    decay = optax.linear_schedule(1.0, 0.0, stage.steps - stage.small_steps, stage.small_steps)
    warm = optax.linear_schedule(0.0, stage.learning_rate, 100)
    optimizer = muon_optimizer(lambda step: warm(step) * decay(step))

    def loss(params: Tree, key: jax.Array, *, size: int, batch: int) -> jax.Array:
        draw, noise = jax.random.split(key)
        scenes = sample_scenes(draw, batch, width=size, height=size)
        images = render(scenes, width=size, height=size)

        def forward(model: Autoencoder, images: jax.Array):
            posterior = model.encode(images)
            return model.decode(posterior.sample(noise)), posterior

        reconstruction, posterior = model.apply({"params": params}, images, method=forward)
        return autoencoder_loss(reconstruction, images, posterior, kl_weight=stage.kl_weight)

    step = make_step(
        loss, optimizer, seed=stage.seed, ema_decay=stage.ema_decay,
        static_argnames=("size", "batch"),
    )  # fmt: skip

    def advance(state, index: int):
        small = index < stage.small_steps
        size = stage.small_size if small else stage.size
        return step(state, size=size, batch=stage.small_batch if small else stage.batch)

    side = {"width": stage.size, "height": stage.size}
    held_out = render(sample_scenes(jax.random.key(2**31 - 1), 64, held_out=True, **side), **side)
    measure = jax.jit(lambda params: psnr(reconstruct(model, params, held_out), held_out))
    state = loop.run(
        init_state(params, optimizer), advance, steps=stage.steps, folder=folder,
        probe=lambda state: {"psnr": float(measure(state.ema))}, probe_every=250,
    )  # fmt: skip
    return state.ema
