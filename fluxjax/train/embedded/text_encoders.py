"""Trains the text side of a small FLUX pipeline on drawn scenes: tokenizers, T5 and CLIP.

Three stages, minutes each on two cores. The tokenizers see every manner of phrasing, the encoders
sentences alone: `paraphrase` then teaches them the rest. Captions and pictures are drawn as
training goes, from the seed and the step alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from fluxjax.checkpoint.pipeline_folder import save_params
from fluxjax.config import CLIPVisionConfig, FluxPipelineConfig
from fluxjax.models.clip import CLIPTextModel
from fluxjax.models.clip_vision import CLIPVisionModel
from fluxjax.models.t5 import T5Encoder
from fluxjax.text.tokenizers import load_clip_tokenizer, load_t5_tokenizer
from fluxjax.train.embedded.phrasing import Caption, captions, vary
from fluxjax.train.embedded.scenes import Scene, render, sample_scenes
from fluxjax.train.embedded.text_objectives import (
    LOGIT_SCALE_INIT,
    QUESTIONS,
    SceneReadout,
    TokenReadout,
    contrastive_logits,
    contrastive_loss,
    mask_tokens,
    masked_token_loss,
    readout_loss,
    scene_labels,
    token_labels,
    token_readout_loss,
)
from fluxjax.train.embedded.vocabulary import T5_MASK, train_clip_tokenizer, train_t5_tokenizer
from fluxjax.train.loop import Hooks, Run, RunSettings
from fluxjax.train.optimizers import muon_optimizer
from fluxjax.train.step import init_state, make_step

_HELD_OUT_SEED = 1_000_000_000  # far from every training seed
TINY_VISION = CLIPVisionConfig(
    hidden_size=128,
    intermediate_size=384,
    projection_dim=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=96,
    patch_size=16,
)


@dataclass(frozen=True, kw_only=True)
class TextTraining:
    """Settings of all three stages."""

    seed: int = 0
    width: int = 96
    height: int = 96
    tokenizer_captions: int = 20_000
    clip_vocab_size: int = 1024
    t5_vocab_size: int = 384
    t5_steps: int = 1200
    t5_batch: int = 64
    t5_learning_rate: float = 4e-3
    clip_steps: int = 700
    clip_batch: int = 96
    clip_learning_rate: float = 3e-3
    clip_text_length: int = 36
    held_out_captions: int = 4000  # measured at the end of each stage
    vision: CLIPVisionConfig = TINY_VISION


class Drawn(NamedTuple):
    """Scenes with their captions and, word for word what the encoders read, `texts`."""

    scenes: Scene
    captions: list[Caption]
    texts: list[str]


def draw(
    settings: TextTraining,
    seed: int,
    n: int,
    *,
    held_out: bool = False,
    manner: str | None = None,
) -> Drawn:
    """`n` scenes and captions, in all of phrasing.MANNERS or one; a seed draws the same ones."""
    scenes = sample_scenes(
        jax.random.key(seed), n, width=settings.width, height=settings.height, held_out=held_out
    )
    rng = np.random.default_rng(seed)
    typed = [vary(c, rng, typos=0.0) for c in captions(scenes, seed, manner)]
    return Drawn(scenes, typed, [c.text for c in typed])


def train_tokenizers(folder: Path, config: FluxPipelineConfig, settings: TextTraining) -> None:
    """Writes folder/tokenizer (CLIP) and folder/tokenizer_2 (T5)."""
    seed, count = settings.seed + _HELD_OUT_SEED // 2, settings.tokenizer_captions
    texts = [t for i in range(0, count, 1000) for t in draw(settings, seed + i, 1000).texts]
    train_clip_tokenizer(texts, folder / "tokenizer", vocab_size=settings.clip_vocab_size)
    train_t5_tokenizer(
        texts,
        folder / "tokenizer_2",
        vocab_size=settings.t5_vocab_size,
        max_length=config.max_sequence_length,
    )


def fit_vocabularies(folder: Path, config: FluxPipelineConfig) -> FluxPipelineConfig:
    """`config` with the vocabulary sizes and special ids of the tokenizers in `folder`."""
    clip = load_clip_tokenizer(folder / "tokenizer").backend.get_vocab_size()
    t5 = load_t5_tokenizer(folder / "tokenizer_2").backend.get_vocab_size()
    return replace(
        config,
        text_encoder=replace(
            config.text_encoder,
            vocab_size=clip,
            bos_token_id=clip - 2,
            eos_token_id=clip - 1,
            pad_token_id=clip - 1,
        ),
        text_encoder_2=replace(config.text_encoder_2, vocab_size=t5),
    )


def cosine_muon(rate: float, steps: int) -> optax.GradientTransformation:
    """Muon whose learning rate rises to `rate`, then falls to a hundredth over `steps`."""
    warmup = max(1, min(100, steps // 10))
    decay = max(steps, warmup + 1)
    return muon_optimizer(optax.warmup_cosine_decay_schedule(0.0, rate, warmup, decay, 0.01 * rate))


class _T5Lesson:
    """T5, and what it learns by: read-outs of the scene and masked tokens."""

    def __init__(self, folder: Path, config: FluxPipelineConfig) -> None:
        self.config, self.length = config.text_encoder_2, config.max_sequence_length
        self.tokenizer = load_t5_tokenizer(folder / "tokenizer_2")
        self.mask_id = self.tokenizer.backend.token_to_id(T5_MASK) or 0
        self.encoder: Any = T5Encoder(self.config, scan_layers=True)
        self.readout: Any = SceneReadout()
        self.at_tokens: Any = TokenReadout()
        self.to_tokens: Any = nn.Dense(self.config.vocab_size)

    def init(self, seed: int) -> Any:
        keys = jax.random.split(jax.random.key(seed), 4)
        states = jnp.zeros((1, self.length, self.config.d_model))
        return {
            "encoder": self.encoder.init(keys[0], jnp.zeros((1, self.length), jnp.int32))["params"],
            "readout": self.readout.init(keys[1], states)["params"],
            "at_tokens": self.at_tokens.init(keys[3], states)["params"],
            "to_tokens": self.to_tokens.init(keys[2], states)["params"],
        }

    def batch(self, drawn: Drawn) -> tuple[tuple[np.ndarray, ...], tuple[str, ...]]:
        """(ids, mask, labels, spoken), and of each text what was cut off."""
        ids, mask, removed = self.tokenizer(drawn.texts, self.length)
        labels = scene_labels(drawn.scenes, drawn.captions)
        offsets = [e.offsets for e in self.tokenizer.backend.encode_batch(drawn.texts)]
        spoken = token_labels(drawn.scenes, drawn.captions, labels, offsets)
        return (ids, mask, labels, spoken), removed

    def loss(self, params, key, ids, mask, labels, spoken):
        """Clean captions and, after them, a quarter as many masked ones in one pass; only the clean
        ones are asked about the scene."""
        n, eos_id = ids.shape[0], self.config.eos_token_id
        few, few_mask = ids[: n // 4], mask[: n // 4]
        masked, hidden = mask_tokens(key, few, few_mask, mask_id=self.mask_id, eos_id=eos_id)
        both = self.encoder.apply({"params": params["encoder"]}, jnp.concatenate([ids, masked]))
        answers = self.readout.apply({"params": params["readout"]}, both[:n])
        logits = self.to_tokens.apply({"params": params["to_tokens"]}, both[n:])
        named = self.at_tokens.apply({"params": params["at_tokens"]}, both[:n])
        return (
            readout_loss(answers, labels)
            + token_readout_loss(named, spoken)
            + 0.3 * masked_token_loss(logits, few, hidden)
        )

    def answers(self, params, ids):
        """To each of QUESTIONS, of each caption."""
        states = self.encoder.apply({"params": params["encoder"]}, ids)
        return self.readout.apply({"params": params["readout"]}, states).argmax(-1)


def train_t5(
    folder: Path, runs: Path, config: FluxPipelineConfig, settings: TextTraining
) -> dict[str, float]:
    """Masked tokens and scene read-out, unmasked and padded as FLUX reads T5.

    Writes folder/text_encoder_2 (bfloat16) and returns the accuracy of the read-out per question on
    captions never trained on ("held out": with object pairs never trained on).
    """
    lesson = _T5Lesson(folder, config)
    optimizer = cosine_muon(settings.t5_learning_rate, settings.t5_steps)
    step = make_step(lesson.loss, optimizer, seed=settings.seed, ema_decay=0.99)
    answers = jax.jit(lesson.answers)

    def advance(state, i):
        seed = settings.seed * 10_000_019 + i
        drawn = draw(settings, seed, settings.t5_batch, manner="sentence")
        return step(state, *lesson.batch(drawn)[0])

    def measure(params, n: int) -> dict[str, float]:
        report: dict[str, float] = {}
        for name, held_out in (("", False), (" (held out)", True)):
            seed = _HELD_OUT_SEED + settings.seed
            drawn = draw(settings, seed, n, held_out=held_out, manner="sentence")
            (ids, _, labels, _), removed = lesson.batch(drawn)
            right = np.asarray(answers(params, ids)) == labels
            columns = dict(zip(QUESTIONS, right.mean(0), strict=True))
            report |= {f"{k}{name}": float(v) for k, v in columns.items()}
            report[f"all at once{name}"] = float(right.all(1).mean())
            report[f"truncated{name}"] = float(np.mean([r != "" for r in removed]))
        return report

    def probe(state) -> dict[str, float]:
        report = measure(state.ema, min(512, settings.held_out_captions))
        return {k: v for k, v in report.items() if k.startswith("all")}

    run = RunSettings(steps=settings.t5_steps, folder=runs / "t5", probe_every=300)
    state = init_state(lesson.init(settings.seed), optimizer)
    state = Run(run, advance, Hooks(probe=probe)).to_end(state)
    # What is shipped is rounded: measure that.
    trained = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), state.ema)
    save_params(folder, "text_encoder_2", trained["encoder"], lesson.config, jnp.bfloat16)
    return measure(trained, settings.held_out_captions)


def train_clip(
    folder: Path, runs: Path, config: FluxPipelineConfig, settings: TextTraining
) -> dict[str, float]:
    """Symmetric InfoNCE between captions and drawn pictures.

    Writes folder/text_encoder (bfloat16) and returns the retrieval accuracy among 128 pairs.
    Captions are cut to `clip_text_length` while training: the encoder is causal and pools at the
    end token, so what follows it changes nothing.
    """
    tokenizer = load_clip_tokenizer(folder / "tokenizer")
    c, length = config.text_encoder, settings.clip_text_length
    text: Any = CLIPTextModel(replace(c, with_projection=True), scan_layers=True)
    projected = replace(settings.vision, with_projection=True)
    vision: Any = CLIPVisionModel(projected, scan_layers=True)
    keys = jax.random.split(jax.random.key(settings.seed), 2)
    size = settings.vision.image_size
    params = {
        "text": text.init(keys[0], jnp.zeros((1, length), jnp.int32))["params"],
        "vision": vision.init(keys[1], jnp.zeros((1, size, size, 3)))["params"],
        "temperature": {"logit_scale": jnp.asarray(LOGIT_SCALE_INIT)},
    }

    def embed(
        params: Any, ids: Int[Array, "b l"], scenes: Scene
    ) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
        pictures = render(scenes, width=size, height=size)
        texts = text.apply({"params": params["text"]}, ids).text_embeds
        return texts, vision.apply({"params": params["vision"]}, pictures).image_embeds

    def loss(params, key, ids, scenes):
        log_scale = params["temperature"]["logit_scale"]
        return contrastive_loss(*embed(params, ids, scenes), log_scale)

    optimizer = cosine_muon(settings.clip_learning_rate, settings.clip_steps)
    step = make_step(loss, optimizer, seed=settings.seed, ema_decay=0.99)

    def advance(state, i):
        seed = settings.seed * 10_000_019 + i
        drawn = draw(settings, seed, settings.clip_batch, manner="sentence")
        return step(state, tokenizer(drawn.texts, length).input_ids, drawn.scenes)

    similarity = jax.jit(lambda p, *batch: contrastive_logits(*embed(p, *batch), jnp.zeros(())))

    def measure(params, rounds: int) -> dict[str, float]:
        report: dict[str, float] = {}
        for name, held_out in (("", False), (" (held out)", True)):
            right = []
            for i in range(rounds):
                seed = _HELD_OUT_SEED + settings.seed + i
                drawn = draw(settings, seed, 128, held_out=held_out, manner="sentence")
                ids = tokenizer(drawn.texts, length).input_ids
                logits = np.asarray(similarity(params, ids, drawn.scenes))
                right.append([(logits.argmax(axis) == np.arange(128)).mean() for axis in (1, 0)])
            found = np.mean(right, axis=0)
            report |= {f"text to picture{name}": float(found[0])}
            report |= {f"picture to text{name}": float(found[1])}
        return report

    run = RunSettings(steps=settings.clip_steps, folder=runs / "clip", probe_every=300)
    hooks = Hooks(probe=lambda state: measure(state.ema, 2))
    state = Run(run, advance, hooks).to_end(init_state(params, optimizer))
    trained = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), state.ema)
    encoder = {"text_model": trained["text"]["text_model"]}  # FLUX reads the unprojected state
    save_params(folder, "text_encoder", encoder, c, jnp.bfloat16)
    return measure(trained, max(1, settings.held_out_captions // 500))


def train(
    folder: Path, runs: Path, config: FluxPipelineConfig, settings: TextTraining
) -> tuple[FluxPipelineConfig, dict[str, dict[str, float]]]:
    """All three stages. Returns the configuration that fits the vocabularies, and the reports."""
    train_tokenizers(folder, config, settings)
    config = fit_vocabularies(folder, config)
    stages: dict[str, Callable[..., dict[str, float]]] = {"t5": train_t5, "clip": train_clip}
    return config, {name: run(folder, runs, config, settings) for name, run in stages.items()}
