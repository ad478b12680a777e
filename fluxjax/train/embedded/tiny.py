"""Trains the embedded model from nothing: text, autoencoder, transformer, distillation, export.

Every stage leaves its result under the run's folder and is skipped once it is there, so the same
command goes on where it was stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fluxjax.checkpoint.pipeline_folder import load_params, save_params, write_config
from fluxjax.config import TINY, FluxPipelineConfig
from fluxjax.families import Conditioning
from fluxjax.families.flux import encode_prompts, tokenize
from fluxjax.models.autoencoder import Autoencoder
from fluxjax.models.clip import CLIPTextModel
from fluxjax.models.t5 import T5Encoder
from fluxjax.sample.known_words import words_of, write_known
from fluxjax.text.tokenizers import load_clip_tokenizer, load_t5_tokenizer
from fluxjax.train.embedded import text_encoders
from fluxjax.train.embedded.autoencoder import (
    AutoencoderStage,
    finetune_decoder,
    latent_statistics,
    train_autoencoder,
)
from fluxjax.train.embedded.clip_states import ClipStatesStage, train_clip_states
from fluxjax.train.embedded.paraphrase import ParaphraseStage, train_paraphrases
from fluxjax.train.embedded.phrasing import captions
from fluxjax.train.embedded.prompt_distillation import PromptStage, train_prompts
from fluxjax.train.embedded.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    render,
    sample_scenes,
)
from fluxjax.train.embedded.text_encoders import TextTraining, fit_vocabularies
from fluxjax.train.embedded.transformer import (
    Conditioner,
    DistillStage,
    TransformerStage,
    image_encoder,
    train_transformer,
)
from fluxjax.train.embedded.unlearnt import UnlearntStage, train_unlearnt
from fluxjax.train.loop import run_folder
from fluxjax.train.toml_file import build, read_toml

Tree = Any
_CAPTIONS = 8192  # in which all words occur


@dataclass(frozen=True, kw_only=True)
class TinyRecipe:
    """All stages of the embedded model. `folder` receives checkpoints, metrics and the pipeline."""

    folder: Path = Path("runs/tiny")
    text: TextTraining = field(default_factory=TextTraining)
    paraphrase: ParaphraseStage = field(default_factory=ParaphraseStage)
    autoencoder: AutoencoderStage = field(default_factory=AutoencoderStage)
    transformer: TransformerStage = field(default_factory=TransformerStage)
    refine: TransformerStage = field(default_factory=TransformerStage)
    distill: DistillStage = field(default_factory=DistillStage)
    prompts: PromptStage = field(default_factory=PromptStage)
    clip_states: ClipStatesStage = field(default_factory=ClipStatesStage)
    unlearnt: UnlearntStage = field(default_factory=UnlearntStage)
    task: ClassVar[str] = "embedded"

    @property
    def pipeline(self) -> Path:
        """The finished diffusers folder."""
        return self.folder / "pipeline"

    def train(self) -> Path:
        """Runs what is not done yet; returns the folder of the finished pipeline."""
        with run_folder(self.folder):
            return _train_stages(self)


def read_recipe(path: Path) -> TinyRecipe:
    """A TOML file with one table per stage. Raises ConfigError naming an unknown key or stage."""
    values = read_toml(path)
    values.pop("task", None)
    return build(TinyRecipe, values, str(path))


def _train_stages(recipe: TinyRecipe) -> Path:
    folder, pipeline = recipe.folder, recipe.pipeline
    pipeline.mkdir(parents=True, exist_ok=True)
    config = _text(recipe)
    config = _autoencoder(recipe, config)
    write_config(pipeline, config)
    write_world(pipeline, [*recipe.transformer.buckets, *recipe.refine.buckets])
    conditioner = make_conditioner(pipeline, config)
    teacher = _once(
        folder / "teacher",
        config,
        lambda: train_transformer(config, recipe.transformer, conditioner, folder / "transformer"),
    )
    teacher = _once(
        folder / "refined",
        config,
        lambda: train_transformer(config, recipe.refine, conditioner, folder / "refine", teacher),
    )
    student = _once(
        folder / "student",
        config,
        lambda: train_transformer(config, recipe.distill, conditioner, folder / "distill", teacher),
    )
    _prompts(recipe, config, student)
    _clip_states(recipe, config)
    _unlearnt(recipe, config)
    _decoder(recipe, config)
    return pipeline


def _text(recipe: TinyRecipe) -> FluxPipelineConfig:
    done = recipe.folder / "text_report.json"
    if not done.is_file():
        _, report = text_encoders.train(recipe.pipeline, recipe.folder / "text", TINY, recipe.text)
        done.write_text(json.dumps(report, indent=1))
    config = fit_vocabularies(recipe.pipeline, TINY)
    done = recipe.folder / "paraphrase_report.json"
    if not done.is_file():
        runs = recipe.folder / "text" / "paraphrase"
        report = train_paraphrases(recipe.pipeline, config, recipe.paraphrase, runs)
        done.write_text(json.dumps(report, indent=1))
    return config


def _autoencoder(recipe: TinyRecipe, config: FluxPipelineConfig) -> FluxPipelineConfig:
    """Trains it, and sets shift and scale so that latents have mean 0 and deviation 1."""
    statistics = recipe.folder / "latents.json"
    if not statistics.is_file():
        params = train_autoencoder(config.vae, recipe.autoencoder, recipe.folder / "autoencoder")
        size = recipe.autoencoder.size
        scenes = sample_scenes(jax.random.key(0), 256, width=size, height=size)
        images = render(scenes, width=size, height=size)
        shift, scale = latent_statistics(Autoencoder(config.vae), params, images)
        save_params(recipe.pipeline, "vae", params, config.vae, jnp.float16)
        values = {"shift_factor": round(shift, 4), "scaling_factor": round(scale, 4)}
        statistics.write_text(json.dumps(values))
    return replace(config, vae=replace(config.vae, **json.loads(statistics.read_text())))


def _prompts(recipe: TinyRecipe, config: FluxPipelineConfig, student: Tree) -> None:
    """Transformer and text encoders together, from those that the stages before have left."""
    pipeline, learnt = recipe.pipeline, recipe.folder / "prompted"
    done = recipe.folder / "prompts_done.json"
    if done.is_file():
        return
    parts = {
        "text_encoder": ("clip", config.text_encoder, jnp.bfloat16),
        "text_encoder_2": ("t5", config.text_encoder_2, jnp.bfloat16),
        "transformer": ("transformer", config.transformer, jnp.float16),
    }
    if not (learnt / "transformer").is_dir():
        save_params(pipeline, "transformer", student, config.transformer, jnp.float16)
        params = train_prompts(pipeline, config, recipe.prompts, recipe.folder / "prompts")
        for name, (key, part, dtype) in parts.items():
            save_params(learnt, name, params[key], part, dtype)
    for name in parts:
        shutil.copytree(learnt / name, pipeline / name, dirs_exist_ok=True)
    done.write_text(json.dumps({"steps": recipe.prompts.steps}))


def _clip_states(recipe: TinyRecipe, config: FluxPipelineConfig) -> None:
    """What FLUX does not hear of CLIP, and so can come after it."""
    done = recipe.folder / "clip_states_report.json"
    if not done.is_file():
        runs = recipe.folder / "text" / "clip_states"
        report = train_clip_states(recipe.pipeline, config, recipe.clip_states, runs)
        done.write_text(json.dumps(report, indent=1))


def _unlearnt(recipe: TinyRecipe, config: FluxPipelineConfig) -> None:
    """Colours and sizes that the stages before have left out, for the transformer alone."""
    done = recipe.folder / "unlearnt_done.json"
    if not done.is_file():
        stage, pipeline = recipe.unlearnt, recipe.pipeline
        params = train_unlearnt(pipeline, config, stage, recipe.folder / "unlearnt")
        save_params(pipeline, "transformer", params, config.transformer, jnp.float16)
        done.write_text(json.dumps({"steps": stage.steps}))


def _decoder(recipe: TinyRecipe, config: FluxPipelineConfig) -> None:
    """More training for the decoder, which changes no latent, and so can come last."""
    done = recipe.folder / "decoder_done.json"
    if not done.is_file():
        params = load_params(recipe.pipeline, "vae", config.vae, stacked=False, dtype=jnp.float32)
        params = finetune_decoder(config.vae, params, recipe.autoencoder, recipe.folder / "decoder")
        save_params(recipe.pipeline, "vae", params, config.vae, jnp.float16)
        done.write_text(json.dumps({"steps": recipe.autoencoder.decoder_steps}))


def _once(folder: Path, config: FluxPipelineConfig, train) -> Tree:
    """The float32 transformer in `folder`, trained if it is not there yet."""
    if not (folder / "transformer").is_dir():
        save_params(folder, "transformer", train(), config.transformer, jnp.float32)
    return load_params(folder, "transformer", config.transformer, stacked=False)


def make_conditioner(pipeline: Path, config: FluxPipelineConfig) -> Conditioner:
    """The frozen networks of a pipeline folder as functions of pictures and captions."""
    clip_tokenizer = load_clip_tokenizer(pipeline / "tokenizer")
    t5_tokenizer = load_t5_tokenizer(pipeline / "tokenizer_2")
    clip = CLIPTextModel(config.text_encoder, scan_layers=True)
    t5 = T5Encoder(config.text_encoder_2, scan_layers=True)

    def params(component, part) -> Tree:
        return load_params(pipeline, component, part, stacked=True, dtype=jnp.float32)

    clip_params = params("text_encoder", config.text_encoder)
    t5_params = params("text_encoder_2", config.text_encoder_2)

    def encode_text(texts: list[str]) -> Conditioning:
        tokenizers, length = (clip_tokenizer, t5_tokenizer), config.max_sequence_length
        ids, _ = tokenize(tokenizers, texts, max_sequence_length=length)
        return encode_prompts((clip, t5), (clip_params, t5_params), ids)

    return Conditioner(image_encoder(config, params("vae", config.vae)), encode_text)


def write_world(pipeline: Path, buckets: Sequence[tuple[int, int]]) -> None:
    """world.json of the scenes that stand still."""
    knows = (
        f"one to three shapes ({', '.join(SHAPES)}) in {', '.join(COLOURS)}, small, medium or "
        "large, beside, above or below each other, on "
        f"{', '.join(BACKGROUNDS)} or two-coloured backgrounds"
    )
    write_known(pipeline, knows, _words_of_captions(), buckets)


@cache
def _words_of_captions() -> frozenset[str]:
    scenes = sample_scenes(jax.random.key(5), _CAPTIONS, width=96, height=96)
    return frozenset(word for said in captions(scenes, 5) for word in words_of(said.text))
