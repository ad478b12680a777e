"""Teaches a whole pipeline that other words can mean the same picture.

A teacher, the pipeline that understands plain sentences, predicts the velocity of a noisy picture
from the plain sentence of its scene; the student, both text encoders and the transformer together,
learns to predict the same from any caption of it. What counts is what a caption draws: no word has
to have a counterpart, and words of relation are taught as all others are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from fluxjax.checkpoint.pipeline_folder import load_params, read_flux
from fluxjax.config import FluxPipelineConfig
from fluxjax.config.latents import latent_size
from fluxjax.families import FLUX, Conditioning, Extras
from fluxjax.families.flux import PromptIds, encode_prompts
from fluxjax.families.noise_path import FLOW
from fluxjax.models.flux import FluxTransformer
from fluxjax.models.latents import image_ids
from fluxjax.train.embedded.examples import Sizes
from fluxjax.train.embedded.paraphrase import Encoders, open_encoders
from fluxjax.train.embedded.phrasing import caption_and_plain, vary
from fluxjax.train.embedded.scenes import Scene, render, sample_scenes
from fluxjax.train.embedded.transformer import image_encoder
from fluxjax.train.loop import Run, RunSettings
from fluxjax.train.objectives import sample_times, squared_error
from fluxjax.train.optimizers import muon_optimizer
from fluxjax.train.step import Tree, init_state, make_step

_SCENES = 64  # drawn, and their pictures encoded, at once
_LAYOUT_TIMES = 0.8, 1.0  # noise in which a picture's layout is decided


@dataclass(frozen=True, kw_only=True)
class PromptStage:
    """Settings. `teacher`: a pipeline folder; by default the student as it is before.

    `transformer_rate`: the transformer's learning rate, as a share of the text encoders'. `scales`:
    the range of the guidance, which in every other row is `guidance`. `early`: the share of times
    that are those of early steps, whatever the others are.
    """

    teacher: Path | None = None
    steps: int = 1150
    batch: int = 24
    learning_rate: float = 5e-4
    transformer_rate: float = 0.5
    typos: float = 0.1
    early: float = 0.5
    guidance: float = 3.5
    scales: tuple[float, float] = (1.0, 5.0)
    buckets: Sizes = ((96, 96), (112, 80), (96, 96), (80, 112), (96, 96))
    fresh: int = 4
    """Steps for which a set of scenes serves, with other captions each time."""
    seed: int = 9


def prompt_loss(
    model: FluxTransformer, student: Encoders, teacher: Encoders, stage: PromptStage
) -> Any:
    """`loss(params, key, rows, frozen, ids, mu)`: the squared distance of velocities.

    `params` and `frozen` hold clip, t5 and transformer. `rows`: (latents, ids of the captions, of
    the plain sentences).
    """

    def velocity(encoders: Encoders, params: Tree, x: Array, t: Array, ids: PromptIds, *extras):
        networks, texts = (encoders.clip, encoders.t5), (params["clip"], params["t5"])
        heard: Conditioning = encode_prompts(networks, texts, ids)
        return FLUX.forward(model, {"params": params["transformer"]}, x, t, heard, Extras(*extras))

    def loss(params: Tree, key: jax.Array, rows: Any, frozen: Tree, positions: Array, mu: Array):
        latents, typed, plain = rows
        t, scale, noise = draw_noisy(key, latents, mu, stage)
        x = FLOW.state(t).of(latents, noise)
        taught = velocity(teacher, frozen, x, t, plain, positions, scale)
        said = velocity(student, params, x, t, typed, positions, scale)
        return squared_error(said, jax.lax.stop_gradient(taught))

    return loss


def draw_noisy(
    key: jax.Array, latents: Float[Array, "n image c"], mu: Array, stage: Any
) -> tuple[Array, Array, Array]:
    """Times, guidance and noise of a batch. `stage` has `early`, `scales` and `guidance`."""
    n, keys = latents.shape[0], jax.random.split(key, 5)
    early = jax.random.uniform(keys[1], (n,), minval=_LAYOUT_TIMES[0], maxval=_LAYOUT_TIMES[1])
    t = jnp.where(
        jax.random.uniform(keys[0], (n,)) < stage.early, early, sample_times(keys[2], n, mu)
    )
    low, high = stage.scales
    scale = jax.random.uniform(keys[3], (n,), minval=low, maxval=high)
    scale = jnp.where(jnp.arange(n) % 2 == 0, stage.guidance, scale)
    return t, scale, jax.random.normal(keys[4], latents.shape)


class DrawnScenes:
    """Scenes and their latents, a set for each of `buckets` (width, height), which serves for
    `fresh` steps: `self(bucket, step)` depends on the seed and these alone."""

    def __init__(self, buckets: Sizes, fresh: int, seed: int, encode: Any) -> None:
        self.buckets, self.fresh, self.seed, self.encode = buckets, fresh, seed, encode
        self.kept: dict[int, tuple[int, Scene, np.ndarray]] = {}

    def __call__(self, bucket: int, step: int) -> tuple[Scene, np.ndarray]:
        number = step // (len(self.buckets) * self.fresh)
        if self.kept.get(bucket, (-1,))[0] != number:
            width, height = self.buckets[bucket]
            key = jax.random.key(self.seed * 1_000_003 + bucket)
            scenes = sample_scenes(
                jax.random.fold_in(key, number), _SCENES, width=width, height=height
            )
            latents = self.encode(render(scenes, width=width, height=height))
            self.kept[bucket] = number, Scene(*map(np.asarray, scenes)), np.asarray(latents)
        return self.kept[bucket][1:]


class Captions:
    """Batches: `self(step)` depends on the seed and the step alone."""

    def __init__(
        self,
        stage: PromptStage,
        config: FluxPipelineConfig,
        student: Encoders,
        teacher: Encoders,
        vae: Tree,
    ):
        self.stage, self.config = stage, config
        self.student, self.teacher = student, teacher
        encode = image_encoder(config, vae)
        self.scenes = DrawnScenes(stage.buckets, stage.fresh, stage.seed, encode)

    def __call__(self, step: int):
        """(rows of `prompt_loss`, image ids, mu)."""
        stage = self.stage
        bucket = step % len(stage.buckets)
        scenes, latents = self.scenes(bucket, step)
        rng = np.random.default_rng((stage.seed, step))
        rows = rng.choice(_SCENES, stage.batch, replace=False)
        pairs = [caption_and_plain(Scene(*(v[i] for v in scenes)), rng) for i in rows]
        typed = [vary(caption, rng, typos=stage.typos).text for caption, _ in pairs]
        texts = self.student.ids(typed), self.teacher.ids([plain.text for _, plain in pairs])
        positions = image_ids(*latent_size(*stage.buckets[bucket], self.config.vae))
        mu = jnp.float32(self.config.scheduler.mu(len(positions)))
        return (latents[rows], *texts), positions, mu


def train_prompts(folder: Path, config: FluxPipelineConfig, stage: PromptStage, runs: Path) -> Tree:
    """Trains the pipeline in `folder`; returns its averaged (EMA) clip, t5 and transformer."""
    source, taught = folder, config
    if stage.teacher is not None:
        source, taught = stage.teacher, read_flux(stage.teacher)
    student, teacher = open_encoders(folder, config), open_encoders(source, taught)
    model = FluxTransformer(config.transformer, scan_layers=False)

    def whole(path: Path, encoders: Encoders) -> Tree:
        part = load_params(
            path, "transformer", config.transformer, stacked=False, dtype=jnp.float32
        )
        return {**encoders.params, "transformer": part}

    vae = load_params(folder, "vae", config.vae, stacked=True, dtype=jnp.float32)
    batches, frozen = Captions(stage, config, student, teacher, vae), whole(source, teacher)
    step = make_step(
        prompt_loss(model, student, teacher, stage),
        _optimizer(stage),
        seed=stage.seed,
        ema_decay=0.99,
    )

    def advance(state, index: int):
        rows, positions, mu = batches(index)
        return step(state, rows, frozen, positions, mu)

    start = init_state(jax.tree.map(jnp.copy, whole(folder, student)), _optimizer(stage))
    return Run(RunSettings(steps=stage.steps, folder=runs), advance).to_end(start).ema


def _optimizer(stage: PromptStage) -> optax.GradientTransformation:
    warmup = max(1, min(50, stage.steps // 10))
    rate = stage.learning_rate
    both = muon_optimizer(
        optax.warmup_cosine_decay_schedule(
            0.0, rate, warmup, max(stage.steps, warmup + 1), 0.02 * rate
        )
    )

    def update(updates: Tree, state: Any, params: Tree = None, **extra: Any) -> tuple[Tree, Any]:
        updates, state = both.update(updates, state, params, **extra)
        slower = jax.tree.map(lambda x: stage.transformer_rate * x, updates["transformer"])
        return {**updates, "transformer": slower}, state

    return optax.GradientTransformationExtraArgs(both.init, update)
