"""Teaches the states of CLIP's tokens what a caption says; its pooled state stays as it is.

FLUX hears of CLIP the pooled state alone, so that training it leaves the states of the tokens,
which Stable Diffusion hears, with little of the scene. They learn to answer what T5's were asked.
CLIP is causal: what comes after the end token has read everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fluxjax.checkpoint.pipeline_folder import load_params, save_params
from fluxjax.config import FluxPipelineConfig
from fluxjax.models.clip import CLIPTextModel
from fluxjax.text.tokenizers import load_clip_tokenizer
from fluxjax.train.embedded.phrasing import captions, vary
from fluxjax.train.embedded.scenes import sample_scenes
from fluxjax.train.embedded.text_encoders import cosine_muon
from fluxjax.train.embedded.text_objectives import (
    QUESTIONS,
    SceneReadout,
    TokenReadout,
    readout_loss,
    scene_labels,
    token_labels,
    token_readout_loss,
)
from fluxjax.train.loop import Hooks, Run, RunSettings
from fluxjax.train.step import Tree, init_state, make_step

_MEASURED_SEED = 999_999_937  # far from every training seed


@dataclass(frozen=True, kw_only=True)
class ClipStatesStage:
    """Settings. `pooled_weight`: of the pooled state's squared distance from where it was, relative
    to its own square."""

    steps: int = 2000
    batch: int = 96
    learning_rate: float = 3e-3
    pooled_weight: float = 20.0
    width: int = 96
    height: int = 96
    held_out_captions: int = 512
    seed: int = 11


class _ClipLesson:
    """CLIP, the read-outs that ask its tokens, and CLIP as it was `before`."""

    def __init__(self, folder: Path, config: FluxPipelineConfig, stage: ClipStatesStage) -> None:
        self.stage, self.config = stage, config.text_encoder
        self.tokenizer = load_clip_tokenizer(folder / "tokenizer")
        self.before = load_params(
            folder, "text_encoder", self.config, stacked=True, dtype=jnp.float32
        )
        self.clip: Any = CLIPTextModel(self.config, scan_layers=True)
        self.readout: Any = SceneReadout()
        self.at_tokens: Any = TokenReadout()
        self.length = self.config.max_position_embeddings

    def init(self) -> Tree:
        keys = jax.random.split(jax.random.key(self.stage.seed), 2)
        states = jnp.zeros((1, self.length, self.config.hidden_size))
        return {
            "clip": jax.tree.map(jnp.copy, self.before),
            "readout": self.readout.init(keys[0], states)["params"],
            "at_tokens": self.at_tokens.init(keys[1], states)["params"],
        }

    def batch(self, seed: int, n: int, *, held_out: bool = False) -> tuple[Any, Any, Any]:
        """(ids, answers of whole captions, answers of their words)."""
        size = {"width": self.stage.width, "height": self.stage.height}
        scenes = sample_scenes(jax.random.key(seed), n, held_out=held_out, **size)
        rng = np.random.default_rng(seed)
        said = [vary(c, rng) for c in captions(scenes, seed)]
        texts = [c.text for c in said]
        ids = self.tokenizer(texts, self.length).input_ids
        labels = scene_labels(scenes, said)
        return ids, labels, token_labels(scenes, said, labels, _offsets(self.tokenizer, texts))

    def _states(self, params: Tree, ids: Array) -> tuple[Any, Array]:
        """Of the tokens, and how far the pooled one has moved."""
        found = self.clip.apply({"params": params["clip"]}, ids)
        old = jax.lax.stop_gradient(self.clip.apply({"params": self.before}, ids).pooler_output)
        moved = jnp.square(found.pooler_output - old).mean() / jnp.square(old).mean()
        return found.last_hidden_state, moved

    def loss(self, params: Tree, key: Array, ids: Array, labels: Array, spoken: Array) -> Array:
        states, moved = self._states(params, ids)
        answers = self.readout.apply({"params": params["readout"]}, states)
        words: Any = self.at_tokens.apply({"params": params["at_tokens"]}, states)
        words = tuple(w[:, : spoken.shape[1]] for w in words)
        return (
            readout_loss(answers, labels)
            + 0.3 * token_readout_loss(words, spoken)
            + self.stage.pooled_weight * moved
        )

    def answers(self, params: Tree, ids: Array) -> tuple[Array, Array]:
        states, moved = self._states(params, ids)
        return self.readout.apply({"params": params["readout"]}, states).argmax(-1), moved


def train_clip_states(
    folder: Path, config: FluxPipelineConfig, stage: ClipStatesStage, runs: Path
) -> dict[str, float]:
    """Writes folder/text_encoder (bfloat16), which is read from there, and returns what is
    measured: the share of right answers per question, of captions like those of training and of
    held-out ones, and how far the pooled state has moved."""
    lesson = _ClipLesson(folder, config, stage)
    ask = jax.jit(lesson.answers)

    def probe(state: Any) -> dict[str, float]:
        report: dict[str, float] = {}
        for held_out, name in ((False, ""), (True, " held out")):
            n = stage.held_out_captions
            ids, labels, _ = lesson.batch(_MEASURED_SEED, n, held_out=held_out)
            answers, moved = ask(state.ema, ids)
            right = np.asarray(answers) == labels
            shares = dict(zip(QUESTIONS, right.mean(0), strict=True))
            report |= {f"{question}{name}": float(share) for question, share in shares.items()}
            report[f"all at once{name}"] = float(right.all(1).mean())
            report[f"pooled{name}"] = float(moved)
        return report

    optimizer = cosine_muon(stage.learning_rate, stage.steps)
    step = make_step(lesson.loss, optimizer, seed=stage.seed, ema_decay=0.99)

    def advance(state: Any, index: int) -> Any:
        ids, labels, spoken = lesson.batch(stage.seed * 10_000_019 + index, stage.batch)
        padded = np.full((len(ids), lesson.length, spoken.shape[-1]), -1, np.int32)
        padded[:, : spoken.shape[1]] = spoken[:, : lesson.length]
        return step(state, ids, labels, padded)

    run = RunSettings(steps=stage.steps, folder=runs, probe_every=250)
    state = Run(run, advance, Hooks(probe=probe)).to_end(init_state(lesson.init(), optimizer))
    trained = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), state.ema)
    save_params(folder, "text_encoder", trained["clip"], lesson.config, jnp.bfloat16)
    return probe(state._replace(ema=trained))


def _offsets(tokenizer: Any, texts: list[str]) -> list[list[tuple[int, int]]]:
    """Where in the text each token stands."""
    tokenizer.backend.no_padding()
    return [encoded.offsets for encoded in tokenizer.backend.encode_batch(texts)]
