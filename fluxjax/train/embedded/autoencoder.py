"""Trains a KL autoencoder on drawn scenes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from fluxjax.config import AutoencoderConfig
from fluxjax.models.autoencoder import Autoencoder
from fluxjax.train.embedded.scenes import render, sample_scenes
from fluxjax.train.loop import Hooks, Run, RunSettings
from fluxjax.train.objectives import autoencoder_loss
from fluxjax.train.optimizers import muon_optimizer
from fluxjax.train.step import Tree, init_state, make_step


@dataclass(frozen=True, kw_only=True)
class AutoencoderStage:
    """Whole pictures, small ones first (cheaper), then at full size while the rate decays."""

    steps: int = 1750
    small_steps: int = 1100
    small_size: int = 64
    small_batch: int = 12
    size: int = 96
    batch: int = 8
    learning_rate: float = 5e-3
    kl_weight: float = 1e-4
    ema_decay: float = 0.998
    decoder_steps: int = 1500
    decoder_learning_rate: float = 2e-3
    seed: int = 1


def reconstruct(model: nn.Module, params: Tree, images: jax.Array) -> jax.Array:
    """Through the posterior mean and back, clamped to [-1, 1]."""
    reconstruction: Any = model.apply({"params": params}, images)
    return jnp.clip(reconstruction, -1.0, 1.0)


def psnr(reconstruction: jax.Array, images: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB, pictures or clips in [-1, 1], averaged over them."""
    own = tuple(range(1, images.ndim))
    return (10 * jnp.log10(4.0 / jnp.square(reconstruction - images).mean(own))).mean()


def latent_statistics(model: Autoencoder, params: Tree, images: jax.Array) -> tuple[float, float]:
    """(shift, scale) that give the latents of `images` mean 0 and standard deviation 1."""
    posterior: Any = model.apply({"params": params}, images, method=model.encode)
    latents = posterior.mean
    return float(latents.mean()), float(1.0 / latents.std())


def _draw(key: jax.Array, batch: int, size: int) -> jax.Array:
    return render(sample_scenes(key, batch, width=size, height=size), width=size, height=size)


def _run(model: Autoencoder, state, advance, join, stage: AutoencoderStage, folder: Path) -> Tree:
    """The averaged parameters after the loop; `join` makes them whole to measure the PSNR."""
    side = {"width": stage.size, "height": stage.size}
    held_out = render(sample_scenes(jax.random.key(2**31 - 1), 64, held_out=True, **side), **side)
    measure = jax.jit(lambda params: psnr(reconstruct(model, join(params), held_out), held_out))
    state, steps = state
    probe = lambda state: {"psnr": float(measure(state.ema))}  # noqa: E731
    settings = RunSettings(steps=steps, folder=folder, probe_every=250)
    return Run(settings, advance, Hooks(probe=probe)).to_end(state).ema


def train_autoencoder(config: AutoencoderConfig, stage: AutoencoderStage, folder: Path) -> Tree:
    """Encoder and decoder together; returns the averaged (EMA) parameters.

    Checkpoints and metrics lie in `folder`.
    """
    model = Autoencoder(config)
    blank = jnp.zeros((1, stage.small_size, stage.small_size, 3))
    params = jax.jit(model.init)(jax.random.key(stage.seed), blank)["params"]
    decay = optax.linear_schedule(1.0, 0.0, stage.steps - stage.small_steps, stage.small_steps)
    warm = optax.linear_schedule(0.0, stage.learning_rate, 100)
    optimizer = muon_optimizer(lambda step: warm(step) * decay(step))

    def loss(params: Tree, key: jax.Array, *, size: int, batch: int) -> jax.Array:
        draw, noise = jax.random.split(key)
        images = _draw(draw, batch, size)

        def forward(model: Autoencoder, images: jax.Array):
            posterior = model.encode(images)
            return model.decode(posterior.sample(noise)), posterior

        both: Any = model.apply({"params": params}, images, method=forward)
        reconstruction, posterior = both
        return autoencoder_loss(reconstruction, images, posterior, kl_weight=stage.kl_weight)

    step = make_step(
        loss,
        optimizer,
        seed=stage.seed,
        ema_decay=stage.ema_decay,
        static_argnames=("size", "batch"),
    )

    def advance(state, index: int):
        small = index < stage.small_steps
        size = stage.small_size if small else stage.size
        return step(state, size=size, batch=stage.small_batch if small else stage.batch)

    state = init_state(params, optimizer), stage.steps
    return _run(model, state, advance, lambda params: params, stage, folder)


def finetune_decoder(
    config: AutoencoderConfig, params: Tree, stage: AutoencoderStage, folder: Path
) -> Tree:
    """Improves the decoder alone: latents, and so any transformer trained on them, stay valid."""
    model = Autoencoder(config)
    optimizer = muon_optimizer(
        optax.warmup_cosine_decay_schedule(
            0.0, stage.decoder_learning_rate, min(50, stage.decoder_steps // 4), stage.decoder_steps
        )
    )
    encoder = params["encoder"]

    def loss(decoder: Tree, key: jax.Array, encoder: Tree) -> jax.Array:
        draw, noise = jax.random.split(key)
        images = _draw(draw, stage.batch, stage.size)
        posterior: Any = model.apply({"params": {"encoder": encoder}}, images, method=model.encode)
        reconstruction: Any = model.apply(
            {"params": {"decoder": decoder}}, posterior.sample(noise), method=model.decode
        )
        return autoencoder_loss(reconstruction, images, posterior, kl_weight=0.0)

    step = make_step(loss, optimizer, seed=stage.seed + 1, ema_decay=stage.ema_decay)
    state = init_state(params["decoder"], optimizer), stage.decoder_steps

    def join(decoder: Tree) -> Tree:
        return {"encoder": encoder, "decoder": decoder}

    return join(_run(model, state, lambda state, _: step(state, encoder), join, stage, folder))
