"""Measures a model of clips on held-out scenes that move: from text, and from a first frame.

Beside them stands what the reader says of true clips after the autoencoder: no model can be
measured better than that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from fluxjax.config import ConfigError
from fluxjax.sample.override import override
from fluxjax.sample.pictures import to_bytes
from fluxjax.sample.pipeline import Pipeline
from fluxjax.train.embedded.autoencoder import psnr, reconstruct
from fluxjax.train.embedded.captioned_sheet import write_sheet
from fluxjax.train.embedded.evaluate import from_bytes
from fluxjax.train.embedded.evaluate_settings import EvaluateSettings
from fluxjax.train.embedded.moving_captions import moving_captions, states_background
from fluxjax.train.embedded.moving_reader import CLIP_ATTRIBUTES, read_clip, score_clip
from fluxjax.train.embedded.moving_scenes import (
    MOTIONS,
    MovingScene,
    render_clips,
    sample_moving_scenes,
)
from fluxjax.train.embedded.reader import Tally

SHOWN = 12  # clips on the sheet
_STREAM = 7919  # of scenes and captions that no training draws
Counts = dict[str, Tally]


@dataclass(frozen=True, kw_only=True)
class ClipEvaluation:
    """What is right by attribute, in three groups: text, first frame, autoencoder; and by motion
    all of a clip, of those from text."""

    settings: dict[str, Any]
    counts: dict[str, Counts]
    motions: Counts
    psnr: float

    def to_json(self) -> str:
        def plain(of: Counts) -> dict[str, dict[str, int]]:
            return {name: tally._asdict() for name, tally in of.items()}

        groups = {group: plain(of) for group, of in self.counts.items()}
        content = {"settings": self.settings, "counts": groups, "motions": plain(self.motions)}
        return json.dumps({**content, "autoencoder_psnr": self.psnr}, indent=2)


def evaluate_clips(
    pipeline: Pipeline,
    settings: EvaluateSettings,
    progress: Callable[[int], None] = lambda done: None,
) -> ClipEvaluation:
    """Measure an open pipeline; writes the contact sheet if one is asked for.

    Raises ConfigError for a model of pictures, and one whose clips are not square.
    """
    config: Any = pipeline.config
    if config.tiling is None:
        raise ConfigError(f"{settings.model} draws pictures: task clip measures models of clips")
    chosen = override(
        pipeline.defaults,
        {"guidance": settings.guidance, "steps": settings.steps, "seed": settings.seed},
    )
    frames, side = config.frames, config.width
    if side != config.height:
        raise ConfigError(
            f"scenes that move are square, and {settings.model} draws {side} x {config.height}"
        )
    n, stream = settings.prompts, (_STREAM, settings.seed)
    scenes = sample_moving_scenes(stream, n, held_out=settings.held_out)
    captions = moving_captions(scenes, stream)
    true = np.asarray(render_clips(scenes, frames=frames, side=side))
    options = {"steps": chosen.steps, "guidance": chosen.guidance}
    drawn: dict[str, list[UInt8[np.ndarray, "frames side side 3"]]] = {}
    for group in ("text", "first frame"):
        drawn[group] = []
        for i, caption in enumerate(captions):
            given = {"reference": _picture(true[i, 0])} if group == "first frame" else {}
            clips: Any = pipeline(caption, seed=chosen.seed + i, **options, **given)
            drawn[group].append(clips[0].frames)
            progress(sum(map(len, drawn.values())))
    rebuilt = _rebuilt(pipeline, true)
    counts, motions = {}, {name: Tally(0, 0) for name in MOTIONS}
    for group, clips in {**drawn, "autoencoder": rebuilt}.items():
        each = [_score(scenes, i, captions[i], from_bytes(clip)) for i, clip in enumerate(clips)]
        counts[group] = {name: _sum([one[name] for one in each]) for name in CLIP_ATTRIBUTES}
        if group == "text":
            for i, one in enumerate(each):
                name = MOTIONS[int(scenes.motion[i])]
                motions[name] = _sum([motions[name], one["all"]])
    if settings.sheet is not None:
        write_sheet(settings.sheet, *_shown(drawn, captions), fps=config.fps)
    own = {"model": settings.model, "seed": chosen.seed, "held_out": settings.held_out}
    return ClipEvaluation(
        settings={**own, **options, "prompts": n, "side": side, "frames": frames},
        counts=counts,
        motions=motions,
        psnr=float(psnr(jnp.stack([from_bytes(clip) for clip in rebuilt]), jnp.asarray(true))),
    )


def _picture(frame: Float[np.ndarray, "side side 3"]) -> Any:
    from PIL import Image

    return Image.fromarray(to_bytes(frame[None])[0])


def _rebuilt(
    pipeline: Pipeline, clips: Float[np.ndarray, "n frames side side 3"]
) -> list[UInt8[np.ndarray, "frames side side 3"]]:
    """Through the autoencoder's mean and back, one after the other."""
    model, params = pipeline.executables.modules("decode")[0], pipeline.params("vae")
    rebuild = jax.jit(lambda params, clip: reconstruct(model, params, clip))
    return [to_bytes(np.asarray(rebuild(params, clip[None]))[0]) for clip in clips]


def _score(scenes: MovingScene, i: int, caption: str, clip: np.ndarray) -> Counts:
    return score_clip(scenes, i, read_clip(clip), states_background=states_background(caption))


def _sum(tallies: Sequence[Tally]) -> Tally:
    return Tally(sum(t.right for t in tallies), sum(t.asked for t in tallies))


def _shown(
    drawn: dict[str, list[np.ndarray]], captions: list[str]
) -> tuple[list[np.ndarray], list[str]]:
    """The first clips of each group, those from text before those from a first frame."""
    each = SHOWN // len(drawn)
    clips = [clip for of in drawn.values() for clip in of[:each]]
    texts = [f"{group}: {text}" for group in drawn for text in captions[:each]]
    return clips, texts


def print_clip_evaluation(evaluation: ClipEvaluation) -> None:
    """The table that answers: how often does the model show what it was asked for?"""
    from rich.console import Console
    from rich.table import Table

    s = evaluation.settings
    table = Table(
        title=f"{s['model']}, {s['frames']} frames of {s['side']} x {s['side']}, {s['steps']} "
        f"steps, guidance {s['guidance']:g}, seed {s['seed']}, "
        f"{'held-out' if s['held_out'] else 'ordinary'} scenes, {s['prompts']} of each",
        caption="colour and shape by object, the rest by clip. The last column is what the reader "
        f"makes of true clips after the autoencoder (PSNR {evaluation.psnr:.1f} dB).",
    )
    for name in ("right", *evaluation.counts):
        table.add_column(name, justify="left" if name == "right" else "right")
    for name in CLIP_ATTRIBUTES:
        cells = [_share(of[name]) for of in evaluation.counts.values()]
        table.add_row(name, *cells, style="bold" if name == "all" else None)
    for name, tally in evaluation.motions.items():
        table.add_row(f"all, {name}", _share(tally))
    Console(soft_wrap=False).print(table)


def _share(tally: Tally) -> str:
    return f"{tally.right / tally.asked:.3f} of {tally.asked}" if tally.asked else "-"
