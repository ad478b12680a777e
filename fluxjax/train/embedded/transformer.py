"""Trains the FLUX transformer on drawn scenes: flow matching, then guidance distillation.

Autoencoder and text encoders are frozen: they only fill the pool of examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from fluxjax.config import FluxPipelineConfig
from fluxjax.config.latents import latent_size
from fluxjax.families import FLUX, Conditioning, Extras
from fluxjax.models.autoencoder import Autoencoder, normalize_latents
from fluxjax.models.flux import FluxTransformer
from fluxjax.models.latents import image_ids, pack, text_ids
from fluxjax.models.products import BFLOAT16
from fluxjax.train.embedded.phrasing import captions, vary
from fluxjax.train.embedded.scenes import render, sample_scenes
from fluxjax.train.flow_matching import Rows, finetune_loss
from fluxjax.train.loop import Run, RunSettings
from fluxjax.train.objectives import Objective, guided_velocity, sample_times, velocity_loss
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
    buckets: tuple[tuple[int, int], ...] = (
        (96, 96),
        (112, 80),
        (96, 96),
        (80, 112),
        (96, 96),
    )
    products: Literal["float32", "bfloat16"] = "float32"
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


class Conditioner(NamedTuple):
    """Frozen networks around the transformer, as functions with their parameters bound."""

    encode_image: Callable[[Any], Any]
    """(n, height, width, 3) -> (n, image, channels), normalised and packed."""
    encode_text: Callable[[list[str]], Conditioning]
    """Of n captions."""


def image_encoder(config: FluxPipelineConfig, params: Tree):
    """Pictures to packed, normalised posterior means."""
    model = Autoencoder(config.vae)

    @jax.jit
    def encode(images: Float[Array, "n h w 3"]) -> Float[Array, "n image c"]:
        posterior: Any = model.apply({"params": params}, images, method=model.encode)
        packed: Any = pack(jnp.moveaxis(normalize_latents(posterior.mean, config.vae), -1, 1))
        return packed

    return encode


def rows_of(stage: TransformerStage, width: int, height: int) -> int:
    """So many that every bucket's batch has about as many tokens as `stage.batch` of 96 x 96."""
    text, per_token = 32, 16 * 16
    share = (96 * 96 / per_token + text) / (width * height / per_token + text)
    return max(1, round(stage.batch * share / 4)) * 4


class Pool:
    """Examples of one bucket: a ring that a few fresh ones enter at each step.

    Example k depends on (seed, bucket, k // chunk) alone, so a resumed run sees the same pool.
    """

    CHUNK = 64

    def __init__(self, bucket: int, stage: TransformerStage, conditioner: Conditioner, step: int):
        self.width, self.height = stage.buckets[bucket]
        self.stage, self.conditioner, self.bucket = stage, conditioner, bucket
        self.taken = rows_of(stage, self.width, self.height)
        chunks = stage.pool // self.CHUNK
        self.next = self._due(step)
        first = [self._draw(i) for i in range(self.next - chunks, self.next)]
        self.rows = tuple(np.concatenate(parts) for parts in zip(*first, strict=True))

    def _due(self, step: int) -> int:
        """How many chunks have been drawn once `step` begins."""
        return self.stage.pool // self.CHUNK + step * self.stage.fresh // self.CHUNK

    def _draw(self, index: int) -> tuple[np.ndarray, ...]:
        """Latents, and T5's and CLIP's states, of one chunk."""
        seed = self.stage.seed * 1_000_003 + self.bucket
        key = jax.random.fold_in(jax.random.key(seed), index)
        scenes = sample_scenes(key, self.CHUNK, width=self.width, height=self.height)
        rng = np.random.default_rng((seed, index))
        texts = [vary(c, rng).text for c in captions(scenes, seed * 1_000_003 + index)]
        latents = self.conditioner.encode_image(
            render(scenes, width=self.width, height=self.height)
        )
        heard = self.conditioner.encode_text(texts)
        each = latents, heard.sequence, heard.vector
        return tuple(np.asarray(value, np.float16) for value in each)

    def batch(self, step: int) -> Rows:
        while self.next < self._due(step):
            row = self.next * self.CHUNK % self.stage.pool
            for old, new in zip(self.rows, self._draw(self.next), strict=True):
                old[row : row + self.CHUNK] = new
            self.next += 1
        rng = np.random.default_rng((self.stage.seed, step))
        rows = rng.integers(self.stage.pool, size=self.taken)
        latents, text, pooled = (value[rows].astype(np.float32) for value in self.rows)
        index = np.arange(self.taken, dtype=np.int32)
        return Rows(latents, Conditioning(text, None, pooled), index)


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
            self.pools[size] = Pool(bucket, self.stage, self.conditioner, step)
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
        x = jnp.asarray(
            FLUX.noised(rows.latents, jax.random.normal(noise_key, rows.latents.shape), t)
        )
        both = jax.tree.map(
            lambda said, blank: jnp.concatenate([said, jnp.broadcast_to(blank, said.shape)]),
            rows.conditioning,
            empty,
        )
        twice = jnp.tile(x, (2, 1, 1)), jnp.tile(t, 2)
        taught = velocity(teacher, *twice, both, ids, jnp.ones(2 * n))
        conditional, unconditional = jnp.split(jax.lax.stop_gradient(taught), 2)
        target = guided_velocity(conditional, unconditional, scale)
        return velocity_loss(velocity(params, x, t, rows.conditioning, ids, scale), target)

    return loss


def init_transformer(config: FluxPipelineConfig, seed: int) -> tuple[FluxTransformer, Tree]:
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
    model, params = init_transformer(config, stage.seed)
    precision = BFLOAT16 if stage.products == "bfloat16" else None
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
