"""Trains the embedded diffusion models: networks that say what noise is in latents of drawn scenes.

Autoencoder, text encoder and tokenizer are the embedded FLUX model's, frozen: they only fill the
pool of examples. Two stages, each of which goes on where it was stopped; the second learns other
sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from fluxjax.atomic_write import write_bytes
from fluxjax.checkpoint.pipeline_folder import (
    load_params,
    read_config,
    save_params,
    share_folder,
    write_config,
)
from fluxjax.checkpoint.training_state import read_state
from fluxjax.config import (
    TINY_PIXART,
    TINY_SD,
    ConfigError,
    PipelineConfig,
)
from fluxjax.families import Conditioning, family_of
from fluxjax.families.noise_path import DiffusionPath
from fluxjax.hub import find
from fluxjax.models.autoencoder import Autoencoder, normalize_latents
from fluxjax.networks import network_of
from fluxjax.text.tokenizers import load_tokenizer
from fluxjax.train.embedded.examples import Conditioner, Pool, Sizes
from fluxjax.train.embedded.noise_distillation import Teacher, lessons, taught_loss
from fluxjax.train.embedded.tiny import write_world
from fluxjax.train.flow_matching import Learner, finetune_loss
from fluxjax.train.loop import CHECKPOINTS, Run, RunSettings, run_folder
from fluxjax.train.objectives import Objective
from fluxjax.train.optimizers import muon_optimizer
from fluxjax.train.recipe import recipe_toml
from fluxjax.train.settings import Density
from fluxjax.train.step import Tree, init_state, make_step

_AREA = 96 * 96


@dataclass(frozen=True, kw_only=True)
class DiffusionStage:
    """`buckets` are (width, height); step i uses bucket i modulo their number. A batch has `batch`
    pictures of 96 x 96, or as many pixels in others. `min_snr` to `std` are `Objective`'s.
    `taught`: above 0 what the embedded FLUX model sees, told this guidance, is learnt instead of
    the noise itself, always `debiased`; `told_otherwise`: of captions of which share that do not
    say what the picture shows; `unlearnt`: colours of objects that the embedded FLUX model does not
    know, and of which the noise is learnt."""

    steps: int = 7000
    taught: float = 0.0
    told_otherwise: float = 0.0
    unlearnt: tuple[str, ...] = ()
    batch: int = 32
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.01
    decay_steps: int = 1800
    caption_dropout: float = 0.1
    min_snr: float = 5.0
    debiased: bool = False
    density: Density = "auto"
    mean: float = 0.0
    std: float = 1.0
    ema_decay: float = 0.999
    pool: int = 4096
    fresh: int = 8
    buckets: Sizes = ((96, 96),)
    seed: int = 7


@dataclass(frozen=True, kw_only=True)
class DiffusionRecipe:
    """Both stages of an embedded diffusion model: the first has the name of the network that
    learns. `folder` receives checkpoints, metrics and the pipeline."""

    folder: Path
    model: str = "tiny"
    """Whose autoencoder, text encoder and tokenizer are shared."""
    refine: DiffusionStage = field(default_factory=DiffusionStage)
    task: ClassVar[str]
    preset: ClassVar[PipelineConfig]
    """What is trained."""
    shared: ClassVar[Mapping[str, str]]
    """Folders of the embedded FLUX model, by those of this one that they are."""

    @property
    def stages(self) -> dict[str, DiffusionStage]:
        """By the folders of their checkpoints, in order."""
        first = self.preset.denoiser
        return {first: getattr(self, first), "refine": self.refine}

    def train(self) -> Path:
        """Runs what is not done yet; returns the folder of the finished pipeline."""
        with run_folder(self.folder):
            write_bytes(self.folder / "recipe.toml", recipe_toml(self).encode())
            return _train_stages(self)

    def export(self, out: Path, *, link: bool = False) -> Path:
        """The pipeline as of the newest checkpoint of the last stage that has begun, which may
        still go on. `link`: what is shared as symbolic links, as the embedded models are shipped.
        """
        begun = [name for name in self.stages if [*(self.folder / name / CHECKPOINTS).glob("*")]]
        if not begun:
            raise ConfigError(f"{self.folder} has no checkpoint yet")
        _, params = read_state(self.folder / begun[-1] / CHECKPOINTS, "ema")
        return write_pipeline(self, out, params, self.stages[begun[-1]].buckets, link=link)

    def config(self) -> PipelineConfig:
        """The preset, with the configurations of the networks that are shared."""
        source = find(self.model)
        base = read_config(source)
        parts = {name: base.networks[of] for name, of in self.shared.items() if of in base.networks}
        # diffusers' classes of these families read no shift of latents; here that is 1 % of their
        # spread.
        parts["vae"] = replace(parts["vae"], shift_factor=0.0)
        config = replace(self.preset, **parts)
        config.require_whole(source)
        return config


@dataclass(frozen=True, kw_only=True)
class TinySDRecipe(DiffusionRecipe):
    """The embedded Stable Diffusion."""

    folder: Path = Path("runs/tiny_sd")
    unet: DiffusionStage = field(default_factory=DiffusionStage)
    task: ClassVar[str] = "embedded-sd"
    preset: ClassVar[PipelineConfig] = TINY_SD
    shared: ClassVar[Mapping[str, str]] = {
        "vae": "vae",
        "text_encoder": "text_encoder",
        "tokenizer": "tokenizer",
    }


@dataclass(frozen=True, kw_only=True)
class TinyPixArtRecipe(DiffusionRecipe):
    """The embedded PixArt, which hears T5 alone."""

    folder: Path = Path("runs/tiny_pixart")
    transformer: DiffusionStage = field(default_factory=DiffusionStage)
    task: ClassVar[str] = "embedded-pixart"
    preset: ClassVar[PipelineConfig] = TINY_PIXART
    shared: ClassVar[Mapping[str, str]] = {
        "vae": "vae",
        "text_encoder": "text_encoder_2",
        "tokenizer": "tokenizer_2",
    }


def _train_stages(recipe: DiffusionRecipe) -> Path:
    config = recipe.config()
    conditioner = make_conditioner(recipe, config)
    part, of = config.denoiser, config.networks[config.denoiser]
    taught = any(stage.taught for stage in recipe.stages.values())
    teacher = Teacher.open(find(recipe.model)) if taught else None
    params: Tree = None
    for name, stage in recipe.stages.items():
        folder = recipe.folder / name
        if not (folder / part).is_dir():
            by = teacher if stage.taught else None
            params = train_denoiser(config, stage, conditioner, folder, params, by)
            save_params(folder, part, params, of, jnp.float32)
        params = load_params(folder, part, of, stacked=False)
    return write_pipeline(recipe, recipe.folder / "pipeline", params, recipe.refine.buckets)


def write_pipeline(
    recipe: DiffusionRecipe, folder: Path, params: Tree, buckets: Sizes, *, link: bool = False
) -> Path:
    """A diffusers folder: the network in float16, and copies of what is shared, or links to it."""
    source, config = find(recipe.model), recipe.config()
    folder.mkdir(parents=True, exist_ok=True)
    for name, of in recipe.shared.items():
        share_folder(source / of, folder / name, link=link)
    write_config(folder, config, [config.denoiser] if link else config.networks)
    save_params(folder, config.denoiser, params, config.networks[config.denoiser], jnp.float16)
    write_world(folder, buckets)
    return folder


def make_conditioner(recipe: DiffusionRecipe, config: PipelineConfig) -> Conditioner:
    """The frozen networks as functions of pictures and captions."""
    source, family = find(recipe.model), family_of(config.class_name)

    def params(component: str) -> Tree:
        of, folder = config.networks[component], recipe.shared[component]
        return load_params(source, folder, of, stacked=False, dtype=jnp.float32)

    autoencoder, vae = Autoencoder(config.networks["vae"]), params("vae")
    of = config.networks["text_encoder"]
    encoder, weights = network_of(of).build(of), params("text_encoder")
    folder = source / recipe.shared["tokenizer"]
    tokenizer = load_tokenizer(network_of(of).tokenizer, folder, of.vocab_size)

    @jax.jit
    def encode_image(images: Float[Array, "n h w 3"]) -> Float[Array, "n rows columns c"]:
        posterior: Any = autoencoder.apply({"params": vae}, images, method=autoencoder.encode)
        latents: Any = normalize_latents(posterior.mean, config.networks["vae"])
        return latents

    def encode_text(texts: list[str]) -> Conditioning:
        ids, _ = family.tokenize(
            (tokenizer,), texts, max_sequence_length=config.max_sequence_length
        )
        return family.encode((encoder,), (weights,), ids)

    return Conditioner(encode_image, encode_text)


def train_denoiser(
    config: PipelineConfig,
    stage: DiffusionStage,
    conditioner: Conditioner,
    folder: Path,
    start: Tree | None = None,
    teacher: Teacher | None = None,
) -> Tree:
    """From nothing or from `start`, by the noise or by a `teacher`. Returns the averaged (EMA)
    parameters; checkpoints and metrics lie in `folder`."""
    of = config.networks[config.denoiser]
    model = network_of(of).build(of)
    if start is None:
        inputs = network_of(of).inputs(of)
        params = jax.jit(model.init)(jax.random.key(stage.seed), **inputs)["params"]
    else:
        params = jax.tree.map(jnp.copy, start)
    warm = optax.linear_schedule(0.0, stage.learning_rate, 100)
    decay = optax.linear_schedule(1.0, 0.0, stage.decay_steps, stage.steps - stage.decay_steps)
    optimizer = muon_optimizer(
        lambda step: warm(step) * decay(step), weight_decay=stage.weight_decay
    )
    objective = Objective(
        caption_dropout=stage.caption_dropout,
        min_snr=stage.min_snr,
        debiased=stage.debiased,
        density=stage.density,
        mean=stage.mean,
        std=stage.std,
    )
    family, learner = family_of(config.class_name), Learner.of(config)
    if teacher is None:
        loss = finetune_loss(family, model, objective, of=learner)
    else:
        assert isinstance(learner.path, DiffusionPath)
        loss = taught_loss(family, model, learner.path)
        conditioner = lessons(
            objective,
            learner.path,
            teacher,
            conditioner,
            stage.taught,
            told_otherwise=stage.told_otherwise,
            unlearnt=stage.unlearnt,
        )
    step = make_step(loss, optimizer, seed=stage.seed, ema_decay=stage.ema_decay)
    empty = jax.tree.map(jnp.asarray, conditioner.encode_text([""]))
    pools: dict[tuple[int, int], Pool] = {}

    def advance(state, index: int):
        width, height = size = stage.buckets[index % len(stage.buckets)]
        if size not in pools:
            taken = max(1, round(stage.batch * _AREA / (width * height) / 4)) * 4
            pools[size] = Pool(stage.buckets.index(size), stage, conditioner, index, taken)
        return step(state, pools[size].batch(index), {}, empty, None, np.float32(0))

    run = Run(RunSettings(steps=stage.steps, folder=folder), advance)
    return run.to_end(init_state(params, optimizer)).ema
