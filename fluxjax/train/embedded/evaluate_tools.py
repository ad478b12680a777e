"""Measures the embedded model's tools on held-out cases: edit, fill, follow edges.

Beside them stands what the judge says of the right pictures after the autoencoder: no model can be
measured better than that.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fluxjax.config import ConfigError
from fluxjax.sample.masks import painted_latents
from fluxjax.sample.override import override
from fluxjax.sample.picture_inputs import Inputs
from fluxjax.sample.pictures import to_bytes
from fluxjax.sample.pipeline import Pipeline
from fluxjax.train.embedded.captioned_sheet import write_sheet
from fluxjax.train.embedded.evaluate import from_bytes, reconstruct_pictures
from fluxjax.train.embedded.evaluate_settings import EvaluateSettings
from fluxjax.train.embedded.tool_cases import Cases, ToolTask, Verdict, draw_cases, judge
from fluxjax.train.shown_pictures import encode_shown

SHOWN = 18  # cases on the sheet


@dataclass(frozen=True, kw_only=True)
class ToolEvaluation:
    """Verdicts on what the model drew and on what is right, one for each case."""

    settings: dict[str, float | int | str]
    cases: Cases
    drawn: list[Verdict]
    rebuilt: list[Verdict]

    def counts(self) -> dict[str, dict[str, int]]:
        """How many are right, by what is counted; of edits also by what changes."""
        found = {}
        for name, verdicts in (("model", self.drawn), ("autoencoder", self.rebuilt)):
            found[name] = {
                "cases": len(verdicts),
                "asked for": sum(v.asked for v in verdicts),
                "kept": sum(v.kept for v in verdicts),
                "both": sum(v.asked and v.kept for v in verdicts),
            }
        if self.cases.task == "edit":
            right, every = Counter(), Counter()
            for edit, verdict in zip(self.cases.edits, self.drawn, strict=True):
                every[edit.change] += 1
                right[edit.change] += verdict.asked and verdict.kept
            for change in sorted(every):
                found[change] = {"cases": every[change], "both": right[change]}
        return found

    def to_json(self) -> str:
        return json.dumps({"settings": self.settings, "counts": self.counts()}, indent=2)


def evaluate_tool(
    pipeline: Pipeline,
    task: ToolTask,
    settings: EvaluateSettings,
    progress: Callable[[int], None] = lambda done: None,
) -> ToolEvaluation:
    """Measure an open pipeline; writes the contact sheet if one is asked for."""
    if pipeline.mesh is not None:
        raise ConfigError("tools are measured on one device: leave out mesh")
    chosen = override(
        pipeline.defaults,
        {"guidance": settings.guidance, "steps": settings.steps, "seed": settings.seed},
    )
    size = {"width": chosen.width, "height": chosen.height}
    cases = draw_cases(task, settings.prompts, seed=settings.seed, **size)
    given = frozenset(cases.pictures)
    learnt = pipeline.family.find_task(pipeline.config, given, noise_mask=chosen.noise_mask)
    batch = min(settings.batch, settings.prompts)
    parts = []
    for start in range(0, len(cases.prompts), batch):
        rows = [min(i, len(cases.prompts) - 1) for i in range(start, start + batch)]
        inputs: Inputs = encode_shown(
            {name: value[rows] for name, value in cases.pictures.items()},
            learnt.channels,
            pipeline.encode_pictures,
            lambda mask: pipeline.family.mask_channels(mask, pipeline.config),
        )
        if learnt.keeps:
            image, mask = (cases.pictures[name][rows] for name in ("image", "mask"))
            painted = (mask[..., 0] > 0).astype(np.float32)
            inputs = inputs._replace(
                mask=painted_latents(painted, pipeline.config.vae.scale),
                kept=pipeline.encode_pictures(image),
            )
        latents = pipeline.denoise(
            pipeline.encode_prompt([cases.prompts[i] for i in rows]),
            pipeline.draw_noise(chosen, [chosen.seed + i for i in rows], batch),
            steps=chosen.steps,
            guidance=chosen.guidance,
            inputs=inputs,
        )
        parts.append(to_bytes(pipeline.decode(latents))[: len(cases.prompts) - start])
        progress(min(start + batch, len(cases.prompts)))
    drawn = np.concatenate(parts)
    rebuilt = reconstruct_pictures(pipeline, cases.wanted, batch=batch)
    if settings.sheet is not None:
        write_sheet(settings.sheet, *_shown(cases, drawn))
    return ToolEvaluation(
        settings={
            "model": settings.opened,
            "task": task,
            "steps": chosen.steps,
            "guidance": chosen.guidance,
            "seed": chosen.seed,
            **size,
        },
        cases=cases,
        drawn=judge(cases, from_bytes(drawn), rebuilt),
        rebuilt=judge(cases, rebuilt, rebuilt),
    )


def _shown(cases: Cases, drawn: np.ndarray) -> tuple[list[np.ndarray], list[str]]:
    """What was given and what was drawn, side by side. A hole is shown as it is seen: grey."""
    given = cases.pictures
    before = next(iter(given.values()))
    if cases.task == "fill":
        before = np.where(given["mask"] > 0, 0.0, given["image"])
    pairs = []
    for left, right in zip(to_bytes(before[:SHOWN]), drawn, strict=False):
        seam = np.full((len(left), 2, 3), 255, np.uint8)
        pairs.append(np.concatenate([left, seam, right], axis=1))
    return pairs, cases.prompts[:SHOWN]


def print_tool_evaluation(evaluation: ToolEvaluation) -> None:
    """The table that answers: how often does the model do what it was asked for, and no more?"""
    from rich.console import Console
    from rich.table import Table

    s = evaluation.settings
    table = Table(
        title=f"{s['model']}, {s['task']}, {s['width']} x {s['height']}, {s['steps']} steps, "
        f"guidance {s['guidance']:g}, seed {s['seed']}, held-out scenes",
        caption="asked for: what the prompt names is there. kept: all else is as it was (of canny: "
        "the edges are the control's). autoencoder: the right pictures, through it and back.",
    )
    for name in ("", "cases", "asked for", "kept", "both"):
        table.add_column(name, justify="right" if name else "left")
    for name, counts in evaluation.counts().items():
        every = counts["cases"]
        shares = [
            f"{counts[column] / every:.3f}" if column in counts else ""
            for column in ("asked for", "kept", "both")
        ]
        table.add_row(name, str(every), *shares)
    Console(soft_wrap=False).print(table)
