"""Trains the embedded Stable Diffusion: a UNet that says what noise is in latents of drawn scenes.

Autoencoder, CLIP and tokenizer are the embedded FLUX model's, frozen: they only fill the pool of
examples. Two stages, each of which goes on where it was stopped; the second learns other sizes.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from fluxjax.atomic_write import write_bytes
from fluxjax.checkpoint.pipeline_folder import load_params, read_config, save_params, write_config
from fluxjax.checkpoint.training_state import read_state
from fluxjax.config import TINY_SD, ConfigError, StableDiffusionConfig
from fluxjax.families import STABLE_DIFFUSION, Conditioning
from fluxjax.hub import find
from fluxjax.models.autoencoder import Autoencoder, normalize_latents
from fluxjax.models.clip import CLIPTextModel
from fluxjax.models.unet import UNet
from fluxjax.text.tokenizers import load_clip_tokenizer
from fluxjax.train.embedded.examples import Conditioner, Pool, Sizes
from fluxjax.train.embedded.tiny import write_world
from fluxjax.train.flow_matching import Learner, finetune_loss
from fluxjax.train.loop import CHECKPOINTS, Run, RunSettings, run_folder
from fluxjax.train.objectives import Objective
from fluxjax.train.optimizers import muon_optimizer
from fluxjax.train.recipe import recipe_toml
from fluxjax.train.step import Tree, init_state, make_step

SHARED = ("vae", "text_encoder", "tokenizer")
"""Folders of the embedded FLUX model that belong to this one too."""
_AREA = 96 * 96


@dataclass(frozen=True, kw_only=True)
class UNetStage:
    """`buckets` are (width, height); step i uses bucket i modulo their number. A batch has `batch`
    pictures of 96 x 96, or as many pixels in others."""

    steps: int = 7000
    batch: int = 32
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.01
    decay_steps: int = 1800
    caption_dropout: float = 0.1
    min_snr: float = 5.0
    ema_decay: float = 0.999
    pool: int = 4096
    fresh: int = 8
    buckets: Sizes = ((96, 96),)
    seed: int = 7


@dataclass(frozen=True, kw_only=True)
class TinySDRecipe:
    """Both stages of the embedded UNet. `folder` receives checkpoints, metrics and the pipeline."""

    folder: Path = Path("runs/tiny_sd")
    model: str = "tiny"
    """Whose autoencoder, CLIP and tokenizer are shared."""
    unet: UNetStage = field(default_factory=UNetStage)
    refine: UNetStage = field(default_factory=UNetStage)
    task: ClassVar[str] = "embedded-sd"

    def train(self) -> Path:
        """Runs what is not done yet; returns the folder of the finished pipeline."""
        with run_folder(self.folder):
            write_bytes(self.folder / "recipe.toml", recipe_toml(self).encode())
            return _train_stages(self)

    def export(self, out: Path) -> Path:
        """The pipeline as of the newest checkpoint of the last stage that has begun, which may
        still go on."""
        source = find(self.model)
        config, _ = shared_networks(source)
        begun = [name for name in ("unet", "refine") if (self.folder / name / CHECKPOINTS).is_dir()]
        if not begun:
            raise ConfigError(f"{self.folder} has no checkpoint yet")
        _, params = read_state(self.folder / begun[-1] / CHECKPOINTS, "ema")
        stage: UNetStage = getattr(self, begun[-1])
        return write_pipeline(out, source, config, params, stage.buckets)


def _train_stages(recipe: TinySDRecipe) -> Path:
    source = find(recipe.model)
    config, conditioner = shared_networks(source)
    params: Tree = None
    for name in ("unet", "refine"):
        stage, folder = getattr(recipe, name), recipe.folder / name
        if not (folder / "unet").is_dir():
            params = train_unet(config, stage, conditioner, folder, params)
            save_params(folder, "unet", params, config.unet, jnp.float32)
        params = load_params(folder, "unet", config.unet, stacked=False)
    return write_pipeline(recipe.folder / "pipeline", source, config, params, recipe.refine.buckets)


def write_pipeline(
    folder: Path, source: Path, config: StableDiffusionConfig, params: Tree, buckets: Sizes
) -> Path:
    """A diffusers folder: the UNet in float16, and copies of what is shared."""
    for name in SHARED:
        shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
    write_config(folder, config)
    save_params(folder, "unet", params, config.unet, jnp.float16)
    write_world(folder, buckets)
    return folder


def shared_networks(source: Path) -> tuple[StableDiffusionConfig, Conditioner]:
    """The model's configuration, and the frozen networks of a FLUX pipeline that it is to have."""
    base = read_config(source)
    # diffusers' class of this family reads no shift of latents; here that is 1 % of their spread.
    vae = replace(base.vae, shift_factor=0.0)
    config = replace(TINY_SD, vae=vae, text_encoder=base.networks["text_encoder"])
    config.require_whole(source)
    return config, make_conditioner(source, config)


def make_conditioner(source: Path, config: StableDiffusionConfig) -> Conditioner:
    def params(component: str, *, stacked: bool) -> Tree:
        of = config.networks[component]
        return load_params(source, component, of, stacked=stacked, dtype=jnp.float32)

    autoencoder, vae = Autoencoder(config.vae), params("vae", stacked=False)
    clip, weights = CLIPTextModel(config.text_encoder), params("text_encoder", stacked=False)
    tokenizer = load_clip_tokenizer(source / "tokenizer")

    @jax.jit
    def encode_image(images: Float[Array, "n h w 3"]) -> Float[Array, "n rows columns c"]:
        posterior: Any = autoencoder.apply({"params": vae}, images, method=autoencoder.encode)
        latents: Any = normalize_latents(posterior.mean, config.vae)
        return latents

    def encode_text(texts: list[str]) -> Conditioning:
        ids, _ = STABLE_DIFFUSION.tokenize(
            (tokenizer,), texts, max_sequence_length=config.max_sequence_length
        )
        return STABLE_DIFFUSION.encode((clip,), (weights,), ids)

    return Conditioner(encode_image, encode_text)


def train_unet(
    config: StableDiffusionConfig,
    stage: UNetStage,
    conditioner: Conditioner,
    folder: Path,
    start: Tree | None = None,
) -> Tree:
    """From nothing or from `start`. Returns the averaged (EMA) parameters; checkpoints and metrics
    lie in `folder`."""
    model = UNet(config.unet)
    if start is None:
        side = config.unet.sample_size
        latents = jnp.zeros((1, side, side, config.unet.in_channels))
        text = jnp.zeros((1, 2, config.unet.cross_attention_dim))
        key = jax.random.key(stage.seed)
        params = jax.jit(model.init)(key, latents, jnp.zeros(1), text)["params"]
    else:
        params = jax.tree.map(jnp.copy, start)
    warm = optax.linear_schedule(0.0, stage.learning_rate, 100)
    decay = optax.linear_schedule(1.0, 0.0, stage.decay_steps, stage.steps - stage.decay_steps)
    optimizer = muon_optimizer(
        lambda step: warm(step) * decay(step), weight_decay=stage.weight_decay
    )
    objective = Objective(caption_dropout=stage.caption_dropout, min_snr=stage.min_snr)
    loss = finetune_loss(STABLE_DIFFUSION, model, objective, of=Learner.of(config))
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
