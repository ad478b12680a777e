"""Measures prompt following: draw from captions, read the pictures back, count what is right.

Apart for each of KINDS of prompts. All describe scenes that training holds out, or with
`held_out=False` ordinary ones, in words that it never saw together. Beside the model stands the
reader's own score on true renders of the same scenes passed through the autoencoder: no model can
be measured better than that.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from fluxjax.parallel.mesh import pad_rows
from fluxjax.sample.loading import load_pipeline
from fluxjax.sample.override import override
from fluxjax.sample.pipeline import Pipeline
from fluxjax.sample.settings import Settings
from fluxjax.side_output import check_side_output
from fluxjax.train.embedded.captioned_sheet import SHEET_COLUMNS, write_sheet
from fluxjax.train.embedded.evaluate_settings import KINDS, EvaluateSettings
from fluxjax.train.embedded.phrasing import Caption, captions, names_in_order, vary
from fluxjax.train.embedded.reader import ATTRIBUTES, Tally, read, score
from fluxjax.train.embedded.scenes import COLOURS, Scene, render, sample_scenes

READER = "reader"
CHUNK = 256  # scenes drawn at once: one compilation whatever the number of prompts
# Apart from every seed that a training stage draws its scenes with.
_STREAM = 0x0DD5EED

Counts = dict[str, Tally]
Bytes = UInt8[np.ndarray, "n height width 3"]


class Prompts(NamedTuple):
    """Scenes (numpy fields with a leading axis) and a caption for each; no caption twice."""

    scenes: Scene
    captions: list[Caption]

    def scene(self, index: int) -> Scene:
        return Scene(*(field[index] for field in self.scenes))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Counts by kind, and of the reader, and attribute; the autoencoder's PSNR in dB."""

    counts: dict[str, Counts]
    prompts: dict[str, int]
    psnr: float
    settings: dict[str, float | int | str]

    def rate(self, group: str, attribute: str) -> float:
        """Share of right ones; NaN where nothing was asked."""
        tally = self.counts[group][attribute]
        return tally.right / tally.asked if tally.asked else float("nan")

    def to_json(self) -> str:
        counts = {
            group: {name: tally._asdict() for name, tally in of.items()}
            for group, of in self.counts.items()
        }
        content = {"settings": self.settings, "prompts": self.prompts, "counts": counts}
        return json.dumps({**content, "autoencoder_psnr": self.psnr}, indent=2)


def draw_prompts(
    n: int,
    *,
    width: int,
    height: int,
    seed: int,
    held_out: bool,
    manner: str = "sentence",
    colours: Sequence[str] = tuple(COLOURS),
) -> Prompts:
    """`n` scenes with different captions, from a stream of their own, in some of the colours."""
    wanted = np.isin(list(COLOURS), colours)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(_STREAM), seed), int(held_out))
    options = {"width": width, "height": height, "held_out": held_out}
    chosen: dict[str, tuple[Scene, Caption]] = {}
    for chunk in range(8 * n):  # each brings new captions, nearly always more than enough
        drawn = sample_scenes(jax.random.fold_in(key, chunk), CHUNK, **options)
        scenes = Scene(*(np.asarray(field) for field in drawn))
        stream = _STREAM + 4096 * (2 * seed + held_out) + chunk
        rng = np.random.default_rng(stream)
        for i, said in enumerate(captions(scenes, stream, manner)):
            scene = Scene(*(field[i] for field in scenes))
            shown = wanted[scene.colour[: int(scene.count)]].all()
            if shown and (manner != "and" or names_in_order(scene)):
                caption = vary(said, rng, typos=0.0)
                chosen.setdefault(caption.text, (scene, caption))
        if len(chosen) >= n:
            break
    kept = list(chosen.values())[:n]
    return Prompts(
        Scene(*map(np.stack, zip(*(scene for scene, _ in kept), strict=True))),
        [caption for _, caption in kept],
    )


def count_right(prompts: Prompts, pictures: Float[np.ndarray, "n height width 3"]) -> Counts:
    """Sum of `reader.score` over pictures in [-1, 1], one for each prompt."""
    total = {name: Tally(0, 0) for name in ATTRIBUTES}
    for i, (caption, picture) in enumerate(zip(prompts.captions, pictures, strict=True)):
        _add(total, score(prompts.scene(i), caption, read(picture)))
    return total


def from_bytes(pictures: Bytes) -> Float[np.ndarray, "n height width 3"]:
    """0 ... 255 to [-1, 1]."""
    return pictures.astype(np.float32) / 127.5 - 1


def draw_pictures(
    pipeline: Pipeline,
    texts: Sequence[str],
    settings: Settings,
    *,
    batch: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Bytes:
    """One picture per text, `batch` at a time (the last batch is filled up: one compilation).

    Picture i has seed `settings.seed` + i; `progress` hears how many are done.
    """
    pictures = []
    for start in range(0, len(texts), batch):
        indices = [min(i, len(texts) - 1) for i in range(start, start + batch)]
        drawn = pipeline.draw(
            settings,
            prompts=[texts[i] for i in indices],
            seeds=[settings.seed + i for i in indices],
        )
        pictures.append(drawn[: len(texts) - start])
        progress(min(start + batch, len(texts)))
    return np.concatenate(pictures)


def reconstruct_pictures(
    pipeline: Pipeline, pictures: Float[np.ndarray, "n height width 3"], *, batch: int
) -> Float[np.ndarray, "n height width 3"]:
    """Through the pipeline's autoencoder (posterior mean) and back, rounded to bytes.

    `batch` at a time, on a mesh over all its devices.
    """
    from fluxjax.sample.pictures import to_bytes

    parts = []
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        latents = pipeline.encode_pictures(pad_rows(part, batch))
        parts.append(from_bytes(to_bytes(pipeline.decode(latents)))[: len(part)])
    return np.concatenate(parts)


class _Drawn(NamedTuple):
    """One kind at one size: what was asked for and what was drawn."""

    kind: str
    prompts: Prompts
    size: dict[str, int]
    pictures: Bytes


def _parts(settings: EvaluateSettings, own: tuple[int, int]) -> list[tuple[str, int, int, int]]:
    """(kind, number of prompts, width, height) of every part of the measurement."""
    parts = []
    for name in settings.kinds:
        sizes = KINDS[name].sizes or (own,)
        for i, (width, height) in enumerate(sizes):
            share = (settings.prompts * (i + 1)) // len(sizes)
            share -= (settings.prompts * i) // len(sizes)
            if share:
                parts.append((name, share, width, height))
    return parts


def evaluate_pipeline(
    pipeline: Pipeline,
    settings: EvaluateSettings,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Measure an open pipeline; writes the contact sheet if one is asked for."""
    chosen = override(
        pipeline.defaults,
        {"steps": settings.steps, **settings.guided},
    )
    counts: dict[str, Counts] = {
        name: {attribute: Tally(0, 0) for attribute in ATTRIBUTES}
        for name in (*settings.kinds, READER)
    }
    parts: list[_Drawn] = []
    errors: list[np.ndarray] = []
    done = 0
    for name, n, width, height in _parts(settings, (chosen.width, chosen.height)):
        size = {"width": width, "height": height}
        prompts = draw_prompts(
            n,
            seed=settings.seed,
            held_out=settings.held_out,
            manner=KINDS[name].manner,
            colours=settings.colours,
            **size,
        )
        # A batch is filled up: fewer prompts than that would only cost more.
        batch = min(settings.batch, n)
        if pipeline.mesh is not None:
            batch = pipeline.executables.rows("denoise", batch)
        drawn = draw_pictures(
            pipeline,
            [c.text for c in prompts.captions],
            replace(chosen, **size),
            batch=batch,
            progress=lambda i, done=done: progress(done + i),
        )
        done += n
        parts.append(_Drawn(name, prompts, size, drawn))
        true = np.asarray(render(prompts.scenes, **size))
        rebuilt = reconstruct_pictures(pipeline, true, batch=batch)
        errors.append(np.square(rebuilt - true).mean((1, 2, 3)))
        _add(counts[name], count_right(prompts, from_bytes(drawn)))
        _add(counts[READER], count_right(prompts, rebuilt))
    if settings.sheet is not None:
        write_sheet(settings.sheet, *_shown(parts))
    return Evaluation(
        counts=counts,
        prompts={name: settings.prompts for name in settings.kinds} | {READER: done},
        psnr=float((10 * np.log10(4.0 / np.concatenate(errors))).mean()),
        settings={
            "model": settings.model,
            "steps": chosen.steps,
            "guidance": chosen.guidance,
            "true_cfg": chosen.true_cfg,
            "seed": chosen.seed,
            "width": chosen.width,
            "height": chosen.height,
            "held_out": settings.held_out,
        },
    )


def _add(total: Counts, found: Counts) -> None:
    for name, tally in found.items():
        total[name] = Tally(*(a + b for a, b in zip(total[name], tally, strict=True)))


def _shown(parts: Sequence[_Drawn]) -> tuple[list[UInt8[np.ndarray, "_ _ 3"]], list[str]]:
    """SHEET_COLUMNS pictures of each kind with their prompts, all of its sizes in turn."""
    pictures, texts = [], []
    for kind in dict.fromkeys(part.kind for part in parts):
        own = [part for part in parts if part.kind == kind]
        rows = [(part, i) for i in range(SHEET_COLUMNS) for part in own if i < len(part.pictures)]
        for part, i in rows[:SHEET_COLUMNS]:
            pictures.append(part.pictures[i])
            texts.append(part.prompts.captions[i].text)
    return pictures, texts


def print_evaluation(evaluation: Evaluation) -> None:
    """The table that answers: how often does the model draw what it was asked for?"""
    from rich.console import Console
    from rich.table import Table

    s = evaluation.settings
    table = Table(
        title=f"{s['model']}, {s['width']} x {s['height']}, {s['steps']} steps, "
        f"guidance {s['guidance']:g}, true CFG {s['true_cfg']:g}, seed {s['seed']}, "
        f"{'held-out' if s['held_out'] else 'ordinary'} scenes",
        caption="colour, shape and size by object, the rest by picture. The last column is what "
        "the reader makes of true pictures after the autoencoder "
        f"(PSNR {evaluation.psnr:.1f} dB).",
    )
    table.add_column("right")
    for group in evaluation.counts:
        table.add_column(f"{group} ({evaluation.prompts[group]})", justify="right")
    for name in ATTRIBUTES:
        cells = []
        for group in evaluation.counts:
            tally = evaluation.counts[group][name]
            shown = f"{evaluation.rate(group, name):.3f} of {tally.asked}"
            cells.append(shown if tally.asked else "-")
        table.add_row(name, *cells, style="bold" if name == "all" else None)
    Console(soft_wrap=False).print(table)


def evaluate(settings: EvaluateSettings) -> Any:
    """What `python -m fluxjax.train evaluate` does: measure, print and return it: an Evaluation, of
    a tool a ToolEvaluation, of clips a ClipEvaluation.

    Raises FileNotFoundError, ConfigError or OSError with one sentence for a model that cannot be
    opened or a sheet that cannot be written.
    """
    from rich.console import Console
    from rich.progress import Progress

    from fluxjax.sample.cache import enable_cache
    from fluxjax.train.embedded.evaluate_clips import evaluate_clips, print_clip_evaluation
    from fluxjax.train.embedded.evaluate_tools import evaluate_tool, print_tool_evaluation

    if settings.sheet is not None:
        check_side_output(settings.sheet, "sheet")
    if settings.samplers:
        return _evaluate_samplers(settings)
    if note := enable_cache():
        print(f"note: {note}", file=sys.stderr)
    pipeline = load_pipeline(
        settings.opened, mesh=settings.mesh, loras=settings.lora, quantise=settings.quantise
    )
    # Clips are drawn from text and from first frames.
    kinds = {"text": len(settings.kinds), "clip": 2}.get(settings.task, 1)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("drawing", total=settings.prompts * kinds)

        def progress(done: int) -> None:
            bar.update(task, completed=done)

        if settings.task == "text":
            result = evaluate_pipeline(pipeline, settings, progress)
            show = partial(print_evaluation, result)
        elif settings.task == "clip":
            result = evaluate_clips(pipeline, settings, progress)
            show = partial(print_clip_evaluation, result)
        else:
            result = evaluate_tool(pipeline, settings.task, settings, progress)
            show = partial(print_tool_evaluation, result)
    if settings.json:
        print(result.to_json())
    else:
        show()
    return result


def _evaluate_samplers(settings: EvaluateSettings) -> Any:
    """As `evaluate`, of several samplers."""
    from rich.console import Console
    from rich.progress import Progress

    from fluxjax.sample.cache import enable_cache
    from fluxjax.train.embedded.evaluate_samplers import (
        evaluate_samplers,
        plot_samplers,
        print_samplers,
    )

    if settings.plot is not None:
        check_side_output(settings.plot, "plot")
    if note := enable_cache():
        print(f"note: {note}", file=sys.stderr)

    def load(model: str) -> Pipeline:
        loras = settings.lora if model == settings.model else ()
        return load_pipeline(model, mesh=settings.mesh, loras=loras, quantise=settings.quantise)

    with Progress(console=Console(stderr=True), transient=True) as bar:
        total = settings.prompts * len(settings.chosen) * len(set(settings.step_counts))
        task = bar.add_task("drawing", total=total)
        result = evaluate_samplers(settings, load, lambda done: bar.update(task, completed=done))
    if settings.plot is not None:
        plot_samplers(result, settings.plot)
    if settings.json:
        print(result.to_json())
    else:
        print_samplers(result)
    return result
