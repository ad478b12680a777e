"""Trains the embedded model of clips: autoencoder, its decoder, transformer and text encoders.

Text encoders and autoencoder begin as those of the embedded model of pictures. Every stage leaves
its result under the run's folder and is skipped once it is there, so the same command goes on where
it was stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

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
    TINY,
    CausalAutoencoderConfig,
    ConfigError,
    OpenSoraConfig,
    OpenSoraPipelineConfig,
)
from fluxjax.file_hash import hash_files
from fluxjax.hub import find
from fluxjax.models.causal_autoencoder import CausalAutoencoder
from fluxjax.sample.known_words import words_of, write_known
from fluxjax.train.embedded.clip_autoencoder import (
    ClipAutoencoderStage,
    ClipDecoderStage,
    clip_latents_scale,
    drawn_clips,
    train_clip_autoencoder,
    train_clip_decoder,
)
from fluxjax.train.embedded.clip_transformer import (
    ClipExamples,
    ClipTransformerStage,
    train_clip_transformer,
)
from fluxjax.train.embedded.moving_captions import moving_captions
from fluxjax.train.embedded.moving_scenes import (
    MOVING_COLOURS,
    MOVING_SHAPES,
    sample_moving_scenes,
)
from fluxjax.train.embedded.paraphrase import open_encoders
from fluxjax.train.embedded.scenes import BACKGROUNDS
from fluxjax.train.loop import CHECKPOINTS, run_folder
from fluxjax.train.recipe import recipe_toml
from fluxjax.train.step import Tree

_ENCODERS = {"text_encoder": "clip", "text_encoder_2": "t5"}  # and what training calls them
_FULL = jnp.float32
_KNOWS = (
    f"one shape ({', '.join(MOVING_SHAPES)}) in {', '.join(MOVING_COLOURS)} that moves left, "
    "right, up or down, grows, shrinks or turns, or two that pass each other, on "
    f"{', '.join(BACKGROUNDS)} backgrounds"
)
_MEASURED = 256  # clips whose latents say how they are scaled


@dataclass(frozen=True, kw_only=True)
class TinyVideoRecipe:
    """All stages of the embedded model of clips. `folder` receives checkpoints, metrics and the
    pipeline; `model` is the one of pictures whose tokenizers are taken, and whose text encoders and
    autoencoder it begins with. `begins`: one of clips, which a run made, to go on from instead: its
    latents stay, decoder, transformer and text encoders learn on."""

    task: ClassVar[str] = "embedded-video"

    folder: Path = Path("runs/tiny_video")
    model: str = "tiny"
    begins: str | None = None
    frames: int = 9
    side: int = 48
    fps: int = 8
    autoencoder: ClipAutoencoderStage = field(default_factory=ClipAutoencoderStage)
    decoder: ClipDecoderStage = field(default_factory=ClipDecoderStage)
    transformer: ClipTransformerStage = field(default_factory=ClipTransformerStage)

    def __post_init__(self) -> None:
        # What cannot be shows before hours of training.
        self.config.require_frames(self.frames)
        self.config.require_size(self.side, self.side)

    @property
    def pipeline(self) -> Path:
        """The finished pipeline folder."""
        return self.folder / "pipeline"

    @property
    def config(self) -> OpenSoraPipelineConfig:
        """Of the pipeline, with latents that are not scaled yet."""
        stage, vae, texts = self.transformer, self.autoencoder.config, TINY
        token = vae.latent_channels * stage.patch**2
        return OpenSoraPipelineConfig(
            transformer=OpenSoraConfig(
                in_channels=token,
                out_channels=token,
                num_layers=stage.layers,
                num_single_layers=stage.single_layers,
                attention_head_dim=32,
                num_attention_heads=stage.heads,
                joint_attention_dim=texts.text_encoder_2.d_model,
                pooled_projection_dim=texts.text_encoder.hidden_size,
                axes_dims_rope=(8, 12, 12),
                patch_size=stage.patch,
            ),
            vae=vae,
            text_encoder=texts.text_encoder,
            text_encoder_2=texts.text_encoder_2,
            max_sequence_length=48,
            steps=25,
            guidance=4.0,
            image_guidance=2.0,
            motion=0,
            width=self.side,
            height=self.side,
            frames=self.frames,
            fps=self.fps,
        )

    def train(self) -> Path:
        """Runs what is not done yet; returns the folder of the finished pipeline."""
        with run_folder(self.folder):
            write_bytes(self.folder / "recipe.toml", recipe_toml(self).encode())
            return _train_stages(self)

    def export(self, out: Path, *, link: bool = False) -> Path:
        """The pipeline as of the transformer's newest checkpoint, which may still go on. `link`:
        the tokenizers as symbolic links, as the embedded models are shipped."""
        checkpoints = self.folder / "transformer" / CHECKPOINTS
        if not checkpoints.is_dir():
            raise ConfigError(f"{self.folder} has no checkpoint of the transformer yet")
        _, learnt = read_state(checkpoints, "ema")
        return _write_pipeline(self, _trained_autoencoder(self), learnt, out, link=link)


def _train_stages(recipe: TinyVideoRecipe) -> Path:
    vae = _trained_autoencoder(recipe)
    config, begins = replace(recipe.config, vae=vae), _begins(recipe)
    # The encoders read what they did before, perhaps at another length: those of the pipeline are
    # what they become, and a run that is stopped begins again with the same.
    encoders = open_encoders(begins or find(recipe.model), config)
    first = begins and load_params(
        begins, "transformer", config.transformer, stacked=False, dtype=_FULL
    )
    params = load_params(recipe.folder, "vae", vae, stacked=False, dtype=_FULL)
    examples = ClipExamples(
        config,
        recipe.transformer,
        clip_encoder(vae, params),
        encoders,
        recipe.folder / "examples",
        hash_files(recipe.folder, ("vae",))[:16],
    )
    if not (recipe.pipeline / "model_index.json").is_file():
        learnt = train_clip_transformer(
            config, recipe.transformer, encoders, examples, recipe.folder / "transformer", first
        )
        _write_pipeline(recipe, vae, learnt, recipe.pipeline)
    return recipe.pipeline


def _begins(recipe: TinyVideoRecipe) -> Path | None:
    """The model of clips to go on from. Raises ConfigError for one of other networks."""
    if recipe.begins is None:
        return None
    folder, wanted = find(recipe.begins), recipe.config
    found = read_config(folder)
    scale = getattr(found.vae, "scaling_factor", None)
    scaled = replace(wanted, vae=replace(wanted.vae, scaling_factor=scale or 1.0))
    if found.networks != scaled.networks:
        raise ConfigError(f"begins: the networks of {recipe.begins} are not those of this recipe")
    return folder


def _trained_autoencoder(recipe: TinyVideoRecipe) -> CausalAutoencoderConfig:
    """Trains it if it is not there yet, and scales latents so that their mean square is 1, or as
    in the model that training begins with."""
    stage, config, folder = recipe.autoencoder, recipe.autoencoder.config, recipe.folder
    scaled = folder / "latents.json"
    if not scaled.is_file():
        size, model = (recipe.frames, recipe.side), CausalAutoencoder(config)
        load = partial(load_params, stacked=False, dtype=_FULL)
        if begins := _begins(recipe):
            params = load(begins, "vae", config)
        else:
            pictures = load(find(recipe.model), "vae", TINY.vae) if stage.inflated else None
            params = train_clip_autoencoder(stage, *size, folder / "autoencoder", pictures)
        if recipe.decoder.steps:
            params = train_clip_decoder(recipe.decoder, model, params, *size, folder / "decoder")
        if begins:
            scale = read_config(begins).networks["vae"].scaling_factor
        else:
            scale = clip_latents_scale(model, params, drawn_clips(0, _MEASURED, *size))
        save_params(folder, "vae", params, config, jnp.float16)
        scaled.write_text(json.dumps({"scaling_factor": round(scale, 4)}))
    return replace(config, **json.loads(scaled.read_text()))


def _write_pipeline(
    recipe: TinyVideoRecipe,
    vae: CausalAutoencoderConfig,
    learnt: Mapping[str, Tree],
    folder: Path,
    *,
    link: bool = False,
) -> Path:
    """A pipeline folder in float16; the index, by which it is known to be whole, comes last."""
    config, texts = replace(recipe.config, vae=vae), find(recipe.model)
    for name in ("tokenizer", "tokenizer_2"):
        share_folder(texts / name, folder / name, link=link)
    shutil.copytree(recipe.folder / "vae", folder / "vae", dirs_exist_ok=True)
    for name, part in (("transformer", "transformer"), *_ENCODERS.items()):
        save_params(folder, name, learnt[part], getattr(config, name), jnp.float16)
    size = config.width, config.height
    write_known(folder, _KNOWS, _words_of_captions(), [size], config.frames)
    write_config(folder, config)
    return folder


@cache
def _words_of_captions() -> frozenset[str]:
    said = moving_captions(sample_moving_scenes(5, 4096), 5)
    return frozenset(word for caption in said for word in words_of(caption))


def clip_encoder(config: CausalAutoencoderConfig, params: Any):
    """Clips (n, frames, h, w, 3) to scaled latents (n, c, frames, h, w): the posterior's means, or
    with a key drawn from it."""
    model = CausalAutoencoder(config)

    @jax.jit
    def encode(clips: Array, key: Array | None = None) -> Array:
        posterior: Any = model.apply({"params": params}, clips, method=model.encode)
        latents = posterior.mean if key is None else posterior.sample(key)
        return jnp.moveaxis(latents * config.latent_factor, -1, 1)

    return encode
