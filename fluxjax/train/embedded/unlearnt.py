"""Teaches the embedded model's transformer colours and sizes that it never learnt.

What it knows it keeps: of scenes in its colours and sizes it learns the velocities of itself as it
was before, told the plain sentence and less guidance, with which it counts better. Of all others it
learns the true velocity, guided against what it says itself of an empty prompt, which is learnt
beside it. The text encoders stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from fluxjax.checkpoint.pipeline_folder import load_params
from fluxjax.config import FluxPipelineConfig
from fluxjax.config.choices import Products
from fluxjax.config.latents import latent_size
from fluxjax.families import FLUX, Conditioning, Extras
from fluxjax.families.flux import encode_prompts
from fluxjax.families.noise_path import FLOW
from fluxjax.models.flux import FluxTransformer
from fluxjax.models.latents import image_ids
from fluxjax.models.products import PRECISIONS
from fluxjax.train.embedded.examples import Sizes
from fluxjax.train.embedded.paraphrase import Encoders, open_encoders
from fluxjax.train.embedded.phrasing import caption_and_plain, vary
from fluxjax.train.embedded.prompt_distillation import DrawnScenes, draw_noisy
from fluxjax.train.embedded.scenes import Scene, shows, tell_otherwise
from fluxjax.train.embedded.text_encoders import cosine_muon
from fluxjax.train.embedded.transformer import image_encoder, rows_of
from fluxjax.train.loop import Run, RunSettings
from fluxjax.train.objectives import guided_velocity, squared_error
from fluxjax.train.step import Tree, init_state, make_step


@dataclass(frozen=True, kw_only=True)
class UnlearntStage:
    """Settings. `batch`: rows of 96 x 96; of other sizes there are as many tokens. Every other row
    of a size in `buckets` is a scene with an object in one of `colours`, all rows of one in
    `new_buckets` are of any scene.

    `told`: the teacher hears a guidance of 1 + told (g - 1) where the student hears g. `silent`:
    the share of unlearnt rows without a caption; `told_otherwise`: of the others the share that
    says what the picture does not show. `early`, `guidance` and `scales` as of `PromptStage`;
    `products` as of `TransformerStage`.
    """

    steps: int = 3000
    batch: int = 24
    learning_rate: float = 1e-3
    ema_decay: float = 0.998
    colours: tuple[str, ...] = ("white", "black", "gray")
    buckets: Sizes = ((96, 96), (112, 80), (96, 96), (128, 128), (96, 96), (80, 112), (96, 96))
    new_buckets: Sizes = ((64, 64), (160, 160), (128, 64), (80, 160), (64, 128), (160, 80))
    told: float = 0.8
    silent: float = 0.15
    told_otherwise: float = 0.25
    typos: float = 0.1
    early: float = 0.25
    guidance: float = 3.5
    scales: tuple[float, float] = (1.0, 5.0)
    fresh: int = 6
    seed: int = 21
    products: Products = "float32"

    @property
    def order(self) -> Sizes:
        """The sizes of the steps in turn: known ones twice, new ones once."""
        return (*self.buckets, *self.new_buckets[::2], *self.buckets, *self.new_buckets[1::2])


class Examples(NamedTuple):
    """Rows of a batch; the first ones are the teacher's."""

    latents: Float[Array, "n image c"]
    heard: Conditioning
    plain: Conditioning
    """What the teacher hears of its rows."""
    silent: Bool[Array, " rest"]
    """Which of the rows without a teacher have no caption."""


def unlearnt_loss(model: FluxTransformer, stage: UnlearntStage) -> Any:
    """`loss(params, key, examples, frozen, empty, ids, mu)`: the squared distance of velocities.

    The true velocity's noise grows with the guidance g, so rows without a teacher count 1 / g^2.
    """

    def velocity(params: Tree, x: Array, t: Array, heard: Any, ids: Array, scale: Array) -> Array:
        return FLUX.forward(model, {"params": params}, x, t, heard, Extras(ids, scale))

    def loss(
        params: Tree, key: Array, examples: Examples, frozen: Tree, empty: Any, ids: Array, mu: Any
    ) -> Array:
        latents, known = jnp.asarray(examples.latents), len(examples.plain.sequence)
        t, scale, noise = draw_noisy(key, latents, mu, stage)
        x, told = FLOW.state(t).of(latents, noise), 1 + stage.told * (scale - 1)
        wanted, weights = [], []
        if known:
            plain = examples.plain
            wanted += [velocity(frozen, x[:known], t[:known], plain, ids, told[:known])]
            weights += [jnp.ones(known)]
        if rest := len(latents) - known:
            blank = jax.tree.map(lambda e: jnp.broadcast_to(e, (rest, *e.shape[1:])), empty)
            unasked = velocity(params, x[known:], t[known:], blank, ids, scale[known:])
            guidance = jnp.where(examples.silent, 1.0, told[known:])
            wanted += [guided_velocity((noise - latents)[known:], unasked, guidance)]
            weights += [1 / jnp.square(guidance)]
        target = jax.lax.stop_gradient(jnp.concatenate(wanted))
        weight = jnp.concatenate(weights).reshape(-1, 1, 1)
        said = velocity(params, x, t, examples.heard, ids, scale)
        return squared_error(said, target, weight)

    return loss


class UnlearntBatches:
    """`self(step)` depends on the seed and the step alone."""

    def __init__(self, stage: UnlearntStage, config: FluxPipelineConfig, folder: Path) -> None:
        self.stage, self.config = stage, config
        self.encoders: Encoders = open_encoders(folder, config)
        vae = load_params(folder, "vae", config.vae, stacked=True, dtype=jnp.float32)
        self.scenes = DrawnScenes(stage.order, stage.fresh, stage.seed, image_encoder(config, vae))
        networks = self.encoders.clip, self.encoders.t5
        texts = self.encoders.params["clip"], self.encoders.params["t5"]
        self.encode = jax.jit(lambda ids: encode_prompts(networks, texts, ids))

    def heard(self, texts: list[str]) -> Conditioning:
        return jax.tree.map(np.asarray, self.encode(self.encoders.ids(texts)))

    def __call__(self, step: int) -> tuple[Examples, Array, float]:
        """(examples, image ids, mu)."""
        stage, rng = self.stage, np.random.default_rng((self.stage.seed, step))
        bucket = step % len(stage.order)
        width, height = stage.order[bucket]
        scenes, latents = self.scenes(bucket, step)
        n = rows_of(stage.batch, width, height)
        known = n // 2 if (width, height) in stage.buckets else 0
        new = shows(scenes, stage.colours)
        rest = np.flatnonzero(new) if known else len(new)
        rows = [*rng.choice(np.flatnonzero(~new), known), *rng.choice(rest, n - known)]
        texts, plain = self._captions(Scene(*(field[rows] for field in scenes)), known, rng)
        silent = rng.random(n - known) < stage.silent
        texts[known:] = ["" if s else text for s, text in zip(silent, texts[known:], strict=True)]
        heard = self.heard([*texts, *plain])
        ids = image_ids(*latent_size(width, height, self.config.vae))
        student = jax.tree.map(lambda x: x[:n], heard)
        teacher = jax.tree.map(lambda x: x[n:], heard)
        examples = Examples(cast(Any, latents[rows]), student, teacher, cast(Any, silent))
        return examples, ids, self.config.scheduler.mu(len(ids))

    def _captions(
        self, scenes: Scene, known: int, rng: np.random.Generator
    ) -> tuple[list[str], list[str]]:
        """What the student reads of each scene, and what the teacher reads of the first ones."""
        stage = self.stage
        first = Scene(*(field[:known] for field in scenes))
        first = tell_otherwise(first, rng, stage.told_otherwise, stage.colours)
        told = Scene(*(np.concatenate([a, b[known:]]) for a, b in zip(first, scenes, strict=True)))
        pairs = [
            caption_and_plain(Scene(*(field[i] for field in told)), rng)
            for i in range(len(told.kind))
        ]
        texts = [vary(caption, rng, typos=stage.typos).text for caption, _ in pairs]
        return texts, [plain.text for _, plain in pairs[:known]]


def train_unlearnt(folder: Path, config: FluxPipelineConfig, stage: UnlearntStage, runs: Path):
    """Trains the transformer of the pipeline in `folder`, its own teacher; returns its averaged
    (EMA) parameters, one subtree per block."""
    precision = PRECISIONS[stage.products]
    model = FluxTransformer(config.transformer, scan_layers=False, precision=precision)
    frozen = load_params(
        folder, "transformer", config.transformer, stacked=False, dtype=jnp.float32
    )
    batches = UnlearntBatches(stage, config, folder)
    empty = jax.tree.map(jnp.asarray, batches.heard([""]))
    optimizer = cosine_muon(stage.learning_rate, stage.steps)
    loss = unlearnt_loss(model, stage)
    step = make_step(
        loss, optimizer, seed=stage.seed, ema_decay=stage.ema_decay, precision=precision
    )

    def advance(state, index: int):
        examples, ids, mu = batches(index)
        return step(state, examples, frozen, empty, ids, jnp.float32(mu))

    run = Run(RunSettings(steps=stage.steps, folder=runs), advance)
    return run.to_end(init_state(jax.tree.map(jnp.copy, frozen), optimizer)).ema
