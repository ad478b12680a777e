"""Teaches the text encoders that other words can mean the same picture.

A teacher, the encoders trained on plain sentences, reads the plain sentence of a scene; the student
reads any caption of it. Where words have a counterpart in the sentence (colours, shapes, sizes,
numbers, backgrounds) the states of the student's T5 become the teacher's there, elsewhere any of
the teacher's other states; CLIP's pooled state becomes the teacher's. A transformer that has been
trained on the teacher's states so understands the student's without being trained again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from fluxjax.checkpoint.pipeline_folder import load_params, read_flux, save_params
from fluxjax.config import FluxPipelineConfig, OpenSoraPipelineConfig
from fluxjax.families.flux import PromptIds, encode_prompts
from fluxjax.models.clip import CLIPTextModel
from fluxjax.models.t5 import T5Encoder
from fluxjax.text.tokenizers import PromptTokenizer, load_clip_tokenizer, load_t5_tokenizer
from fluxjax.train.embedded.phrasing import Caption, captions_and_plain, vary
from fluxjax.train.embedded.scenes import sample_scenes
from fluxjax.train.embedded.text_objectives import tokens_of
from fluxjax.train.loop import Hooks, Run, RunSettings
from fluxjax.train.optimizers import muon_optimizer
from fluxjax.train.step import Tree, init_state, make_step

_MEASURED_SEED = 999_999_937  # far from every training seed
_CLIP_LENGTH = 40  # tokens read while training; CLIP is causal, so what follows changes nothing


@dataclass(frozen=True, kw_only=True)
class ParaphraseStage:
    """Settings. `typos`: the share of captions with a wrong letter.

    `teacher`: a pipeline folder whose encoders teach, and with whose weights the student begins,
    so that a transformer trained on their states understands the student; by default the run's own.
    """

    teacher: Path | None = None
    steps: int = 1200
    batch: int = 64
    learning_rate: float = 2.5e-3
    typos: float = 0.12
    width: int = 96
    height: int = 96
    held_out_captions: int = 256
    seed: int = 7


class Encoders(NamedTuple):
    """Both text encoders of a pipeline folder with their tokenizers."""

    clip_tokenizer: PromptTokenizer
    t5_tokenizer: PromptTokenizer
    clip: CLIPTextModel
    t5: T5Encoder
    params: Tree  # {"clip": ..., "t5": ...}
    length: int  # T5 tokens

    def ids(self, texts: list[str]) -> PromptIds:
        clip = self.clip_tokenizer(texts, _CLIP_LENGTH)
        return PromptIds(clip.input_ids, self.t5_tokenizer(texts, self.length).input_ids)


class Lesson(NamedTuple):
    """What the student reads, and what the teacher's states of it are to be.

    `source`: how much of each of the teacher's tokens a student's token is to be; rows without a
    counterpart are 0. `weight`: 1 for words, less for padding. `other`: the teacher's tokens that
    are no word's counterpart.
    """

    ids: PromptIds
    plain: PromptIds
    source: Float[Array | np.ndarray, "b student teacher"]
    weight: Float[Array | np.ndarray, "b student"]
    other: Float[Array | np.ndarray, "b teacher"]


def open_encoders(folder: Path, config: FluxPipelineConfig | OpenSoraPipelineConfig) -> Encoders:
    """The encoders in a pipeline folder, in float32."""

    def params(component: Any, part: Any) -> Tree:
        return load_params(folder, component, part, stacked=True, dtype=jnp.float32)

    return Encoders(
        load_clip_tokenizer(folder / "tokenizer"),
        load_t5_tokenizer(folder / "tokenizer_2"),
        CLIPTextModel(config.text_encoder, scan_layers=True),
        T5Encoder(config.text_encoder_2, scan_layers=True),
        {
            "clip": params("text_encoder", config.text_encoder),
            "t5": params("text_encoder_2", config.text_encoder_2),
        },
        config.max_sequence_length,
    )


def warm_start(old: Encoders, config: FluxPipelineConfig, folder: Path) -> Encoders:
    """The same networks behind the tokenizers in `folder`, whose new pieces begin as the mean of
    what the old tokenizer made of them."""
    clip_tokenizer = load_clip_tokenizer(folder / "tokenizer")
    t5_tokenizer = load_t5_tokenizer(folder / "tokenizer_2")
    params = jax.tree.map(lambda leaf: leaf, old.params)  # other dicts, the same leaves
    for parts, name, before, after in (
        (params["t5"], "t5", old.t5_tokenizer, t5_tokenizer),
        (params["clip"]["text_model"]["embeddings"], "clip", old.clip_tokenizer, clip_tokenizer),
    ):
        key = "shared" if name == "t5" else "token_embedding"
        rows = np.asarray(parts[key]["embedding"])
        known, pieces = before.backend.get_vocab(), after.backend.get_vocab()
        moved = np.zeros((len(pieces), rows.shape[1]), np.float32)
        for piece, index in pieces.items():
            if piece in known:
                moved[index] = rows[known[piece]]
            else:
                word = piece.replace("▁", "").replace("</w>", "")
                before.backend.no_truncation()
                before.backend.no_padding()
                moved[index] = rows[before.backend.encode(word, add_special_tokens=False).ids].mean(
                    0
                )
        parts[key] = {"embedding": jnp.asarray(moved)}
    return Encoders(
        clip_tokenizer,
        t5_tokenizer,
        CLIPTextModel(config.text_encoder, scan_layers=True),
        T5Encoder(config.text_encoder_2, scan_layers=True),
        params,
        old.length,
    )


def align(
    caption: Caption,
    plain: Caption,
    offsets: tuple[list[tuple[int, int]], list[tuple[int, int]]],
    length: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(source, weight, other) of `Lesson` for one caption; offsets end with the end token's."""
    source = np.zeros((length, length), np.float32)
    weight = np.zeros(length, np.float32)
    other = np.ones(length, np.float32)
    ends = [min(len(o), length) - 1 for o in offsets]
    for name, span in caption.spans.items():
        theirs = (
            [j for j in tokens_of(plain.spans[name], offsets[1]) if j < ends[1]]
            if (name in plain.spans)
            else []
        )
        ours = [i for i in tokens_of(span, offsets[0]) if i < ends[0]]
        if not theirs:
            continue
        for n, i in enumerate(ours):
            if len(ours) == len(theirs):
                source[i, theirs[n]] = 1
            else:
                source[i, theirs] = 1 / len(theirs)
            weight[i] = 1
        other[theirs] = 0
    for i in range(ends[0], length):  # the end token, then padding
        source[i, min(ends[1] + i - ends[0], length - 1)] = 1
        weight[i] = 0.5
    return source, weight, other


def draw_lesson(
    student: Encoders,
    teacher: Encoders,
    stage: ParaphraseStage,
    seed: int,
    n: int,
    *,
    held_out: bool = False,
    manner: str | None = None,
) -> Lesson:
    """`n` captions with their plain sentences; the same seed draws the same ones."""
    scenes = sample_scenes(
        jax.random.key(seed), n, width=stage.width, height=stage.height, held_out=held_out
    )
    rng = np.random.default_rng(seed)
    pairs = [
        (vary(typed, rng, typos=stage.typos), plain)
        for typed, plain in captions_and_plain(scenes, seed, manner)
    ]
    typed, plain = ([c.text for c in side] for side in zip(*pairs, strict=True))
    ids, plain_ids = student.ids(typed), teacher.ids(plain)
    student.t5_tokenizer.backend.no_padding()
    teacher.t5_tokenizer.backend.no_padding()
    ours = [e.offsets for e in student.t5_tokenizer.backend.encode_batch(typed)]
    theirs = [e.offsets for e in teacher.t5_tokenizer.backend.encode_batch(plain)]
    aligned = [
        align(*pair, (a, b), student.length) for pair, a, b in zip(pairs, ours, theirs, strict=True)
    ]
    return Lesson(ids, plain_ids, *map(np.stack, zip(*aligned, strict=True)))


def distance(
    states: Float[Array, "b l d"], target: Float[Array, "b l d"], lesson: Lesson
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(squared distance of counterparts, of the others to the nearest of the teacher's others).

    Per channel, so that 1 is about the states' own variance.
    """
    wanted = jnp.einsum("bst,btd->bsd", lesson.source, target)
    error = jnp.square(states - wanted).mean(-1)
    counterparts = (error * lesson.weight).sum() / lesson.weight.sum()
    between = jnp.square(states).mean(-1)[:, :, None] + jnp.square(target).mean(-1)[:, None]
    between -= 2 * jnp.einsum("bsd,btd->bst", states, target) / states.shape[-1]
    nearest = jnp.min(jnp.where(lesson.other[:, None] > 0, between, jnp.inf), axis=2)
    free = (lesson.weight == 0).astype(jnp.float32)
    return counterparts, (nearest * free).sum() / jnp.maximum(free.sum(), 1)


def train_paraphrases(
    folder: Path, config: FluxPipelineConfig, stage: ParaphraseStage, runs: Path
) -> dict[str, float]:
    """Writes folder/text_encoder and folder/text_encoder_2 (bfloat16), returns what is measured.

    `config` fits the tokenizers in `folder`. Measured are squared distances from the teacher's
    states per channel, of words, of the other tokens and of the pooled state.
    """
    if stage.teacher is None:
        teacher = student = open_encoders(folder, config)
    else:
        teacher = open_encoders(stage.teacher, read_flux(stage.teacher))
        student = warm_start(teacher, config, folder)

    def both(encoders: Encoders, params: Tree, ids: PromptIds):
        return encode_prompts((encoders.clip, encoders.t5), (params["clip"], params["t5"]), ids)

    def errors(params: Tree, lesson: Lesson) -> dict[str, Array]:
        target = jax.lax.stop_gradient(both(teacher, teacher.params, lesson.plain))
        found = both(student, params, lesson.ids)
        words, others = distance(found.sequence, target.sequence, lesson)
        pooled = jnp.square(found.vector - target.vector).mean() / jnp.square(target.vector).mean()
        return {"words": words, "others": others, "pooled": pooled}

    def loss(params: Tree, key: Array, lesson: Lesson) -> Array:
        e = errors(params, lesson)
        return e["words"] + 0.3 * e["others"] + e["pooled"]

    rate, warmup = stage.learning_rate, max(1, min(50, stage.steps // 10))
    optimizer = muon_optimizer(
        optax.warmup_cosine_decay_schedule(
            0.0, rate, warmup, max(stage.steps, warmup + 1), 0.01 * rate
        )
    )
    step = make_step(loss, optimizer, seed=stage.seed, ema_decay=0.99)
    measured = jax.jit(errors)

    def advance(state, index: int):
        seed = stage.seed * 10_000_019 + index
        return step(state, draw_lesson(student, teacher, stage, seed, stage.batch))

    def probe(state) -> dict[str, float]:
        report = {}
        for held_out in (False, True):
            lesson = draw_lesson(
                student, teacher, stage, _MEASURED_SEED, stage.held_out_captions, held_out=held_out
            )
            for name, value in measured(state.ema, lesson).items():
                report[f"{name}{' held out' if held_out else ''}"] = float(value)
        return report

    run = RunSettings(steps=stage.steps, folder=runs, probe_every=250)
    start = init_state(jax.tree.map(jnp.copy, student.params), optimizer)
    state = Run(run, advance, Hooks(probe=probe)).to_end(start)
    trained = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), state.ema)
    save_params(folder, "text_encoder", trained["clip"], config.text_encoder, jnp.bfloat16)
    save_params(folder, "text_encoder_2", trained["t5"], config.text_encoder_2, jnp.bfloat16)
    return probe(state._replace(ema=trained))
