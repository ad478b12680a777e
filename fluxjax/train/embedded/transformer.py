"""Trains the FLUX transformer on drawn scenes: flow matching, then guidance distillation.

Autoencoder and text encoders are frozen: they only fill the pool of examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from fluxjax.config import FluxPipelineConfig
from fluxjax.config.choices import Products
from fluxjax.config.latents import latent_size
from fluxjax.families import FLUX, Conditioning, Extras
from fluxjax.families.noise_path import FLOW
from fluxjax.models.autoencoder import Autoencoder, normalize_latents
from fluxjax.models.flux import FluxTransformer
from fluxjax.models.latents import image_ids, pack, text_ids
from fluxjax.models.products import PRECISIONS
from fluxjax.train.embedded.examples import Conditioner, Pool, Sizes
from fluxjax.train.flow_matching import Rows, finetune_loss
from fluxjax.train.loop import Run, RunSettings
from fluxjax.train.objectives import Objective, guided_velocity, sample_times, squared_error
from fluxjax.train.optimizers import muon_optimizer
from fluxjax.train.step import Tree, init_state, make_step


@dataclass(frozen=True, kw_only=True)
class TransformerStage:
    """`buckets` are (width, height); step i uses bucket i modulo their number.

    `products` rounds the operands of matrix products, see `models/products.py`.
    `time_shift` is added to the mu of sampling: above 0, more of the times are noisy ones.
    """

    steps: int = 5000
    batch: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    decay_steps: int = 1500
    caption_dropout: float = 0.1
    ema_decay: float = 0.998
    pool: int = 4096
    fresh: int = 8
    buckets: Sizes = (
        (96, 96),
        (112, 80),
        (96, 96),
        (80, 112),
        (96, 96),
    )
    products: Products = "float32"
    time_shift: float = 0.0
    seed: int = 3


@dataclass(frozen=True, kw_only=True)
class DistillStage(TransformerStage):
    """The student learns the guided velocity of its teacher for random guidance in `scales`."""

    steps: int = 800
    learning_rate: float = 1e-3
    decay_steps: int = 600
    ema_decay: float = 0.99
    scales: tuple[float, float] = (1.0, 5.0)
    seed: int = 4


def image_encoder(config: FluxPipelineConfig, params: Tree):
    """Pictures to packed, normalised posterior means."""
    model = Autoencoder(config.vae)

    @jax.jit
    def encode(images: Float[Array, "n h w 3"]) -> Float[Array, "n image c"]:
        posterior: Any = model.apply({"params": params}, images, method=model.encode)
        packed: Any = pack(jnp.moveaxis(normalize_latents(posterior.mean, config.vae), -1, 1))
        return packed

    return encode


def rows_of(batch: int, width: int, height: int) -> int:
    """So many that every bucket's batch has about as many tokens as `batch` of 96 x 96."""
    text, per_token = 32, 16 * 16
    share = (96 * 96 / per_token + text) / (width * height / per_token + text)
    return max(1, round(batch * share / 4)) * 4


class Batches:
    """All buckets; `self(step)` gives (rows, image ids, mu)."""

    def __init__(
        self, config: FluxPipelineConfig, stage: TransformerStage, conditioner: Conditioner
    ):
        self.config, self.stage, self.conditioner = config, stage, conditioner
        self.pools: dict[tuple[int, int], Pool] = {}

    def __call__(self, step: int):
        width, height = size = self.stage.buckets[step % len(self.stage.buckets)]
        if size not in self.pools:
            bucket = self.stage.buckets.index(size)
            taken = rows_of(self.stage.batch, width, height)
            self.pools[size] = Pool(bucket, self.stage, self.conditioner, step, taken)
        ids = image_ids(*latent_size(width, height, self.config.vae))
        mu = self.config.scheduler.mu(len(ids)) + self.stage.time_shift
        return self.pools[size].batch(step), ids, mu


def guidance_distillation_loss(model: FluxTransformer, scales: tuple[float, float]):
    """`loss(params, key, rows, teacher, empty, ids, mu)`: one pass learns two passes' guidance.

    Source: Meng et al. 2022, On distillation of guided diffusion models, stage one.
    """

    def velocity(params: Tree, x: Array, t: Array, heard: Conditioning, ids, guidance: Array):
        return FLUX.forward(model, {"params": params}, x, t, heard, Extras(ids, guidance))

    def loss(
        params: Tree, key: jax.Array, rows: Rows, teacher: Tree, empty: Conditioning, ids, mu
    ) -> jax.Array:
        scale_key, time_key, noise_key = jax.random.split(key, 3)
        n = rows.latents.shape[0]
        scale = jax.random.uniform(scale_key, (n,), minval=scales[0], maxval=scales[1])
        t = sample_times(time_key, n, mu)
        noise = jax.random.normal(noise_key, rows.latents.shape)
        x = FLOW.state(t).of(rows.latents, noise)
        both = jax.tree.map(
            lambda said, blank: jnp.concatenate([said, jnp.broadcast_to(blank, said.shape)]),
            rows.conditioning,
            empty,
        )
        twice = jnp.tile(x, (2, 1, 1)), jnp.tile(t, 2)
        taught = velocity(teacher, *twice, both, ids, jnp.ones(2 * n))
        conditional, unconditional = jnp.split(jax.lax.stop_gradient(taught), 2)
        target = guided_velocity(conditional, unconditional, scale)
        return squared_error(velocity(params, x, t, rows.conditioning, ids, scale), target)

    return loss


def _init_transformer(config: FluxPipelineConfig, seed: int) -> tuple[FluxTransformer, Tree]:
    model = FluxTransformer(config.transformer, scan_layers=False)
    c, tokens = config.transformer, image_ids(4, 4)
    params = jax.jit(model.init)(
        jax.random.key(seed),
        jnp.zeros((1, 4, c.in_channels)),
        jnp.zeros((1, 2, c.joint_attention_dim)),
        jnp.zeros((1, c.pooled_projection_dim)),
        jnp.zeros(1),
        tokens,
        text_ids(2),
        jnp.zeros(1),
    )["params"]
    return model, params


def train_transformer(
    config: FluxPipelineConfig,
    stage: TransformerStage,
    conditioner: Conditioner,
    folder: Path,
    start: Tree | None = None,
) -> Tree:
    """Flow matching, from nothing or from `start`; with a `DistillStage` `start` is the teacher.

    Returns the averaged (EMA) parameters, one subtree per block (on CPUs a scan would copy what
    each block saves for its derivative); checkpoints and metrics lie in `folder`.
    """
    model, params = _init_transformer(config, stage.seed)
    precision = PRECISIONS[stage.products]
    model = model.clone(precision=precision)
    if start is not None:
        params = jax.tree.map(jnp.copy, start)
    warm = optax.linear_schedule(0.0, stage.learning_rate, 100)
    decay = optax.linear_schedule(1.0, 0.0, stage.decay_steps, stage.steps - stage.decay_steps)
    optimizer = muon_optimizer(
        lambda step: warm(step) * decay(step), weight_decay=stage.weight_decay
    )
    batches = Batches(config, stage, conditioner)
    empty = jax.tree.map(jnp.asarray, conditioner.encode_text([""]))
    frozen: Tree = {}
    if isinstance(stage, DistillStage):
        loss, frozen = guidance_distillation_loss(model, stage.scales), start
    else:
        loss = finetune_loss(FLUX, model, Objective(caption_dropout=stage.caption_dropout))
    step = make_step(
        loss, optimizer, seed=stage.seed, ema_decay=stage.ema_decay, precision=precision
    )

    def advance(state, index: int):
        rows, ids, mu = batches(index)
        return step(state, rows, frozen, empty, ids, jnp.float32(mu))

    run = Run(RunSettings(steps=stage.steps, folder=folder), advance)
    return run.to_end(init_state(params, optimizer)).ema
