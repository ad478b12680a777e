"""Quality against steps: what several samplers, of one model or more, make of the same prompts.

All draw the same held-out scenes from the same seeds; what is counted are the pictures that show
all that their prompts say (`reader.ATTRIBUTES`), in as many steps as are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fluxjax.config import ConfigError
from fluxjax.sample.override import override
from fluxjax.sample.pipeline import Pipeline
from fluxjax.side_output import marker, side_output
from fluxjax.train.embedded.evaluate import (
    Counts,
    Prompts,
    count_right,
    draw_pictures,
    draw_prompts,
    from_bytes,
)
from fluxjax.train.embedded.evaluate_settings import KINDS, EvaluateSettings, Sampler
from fluxjax.train.embedded.reader import ATTRIBUTES

SHOWN = "all"


class Point(NamedTuple):
    """What a sampler made in so many steps."""

    sampler: Sampler
    steps: int
    counts: Counts

    def rate(self, attribute: str) -> float:
        tally = self.counts[attribute]
        return tally.right / tally.asked if tally.asked else float("nan")


@dataclass(frozen=True, kw_only=True)
class SamplerEvaluation:
    """The points of each sampler, fewest steps first."""

    points: tuple[Point, ...]
    prompts: int

    @property
    def samplers(self) -> list[Sampler]:
        return list(dict.fromkeys(point.sampler for point in self.points))

    def of(self, sampler: Sampler) -> list[Point]:
        return [point for point in self.points if point.sampler == sampler]

    def to_json(self) -> str:
        points = [
            {
                "model": point.sampler.model,
                "sampler": point.sampler.name,
                "steps": point.steps,
                "counts": {name: tally._asdict() for name, tally in point.counts.items()},
            }
            for point in self.points
        ]
        return json.dumps({"prompts": self.prompts, "points": points}, indent=2)


def evaluate_samplers(
    settings: EvaluateSettings,
    load: Callable[[str], Pipeline],
    progress: Callable[[int], None] = lambda done: None,
) -> SamplerEvaluation:
    """`load` opens a model; `progress` hears how many pictures there are.

    Raises ConfigError for a sampler that a model does not have, before anything is drawn.
    """
    pipelines = {name: load(name) for name in dict.fromkeys(s.model for s in settings.chosen)}
    sizes = {(p.defaults.width, p.defaults.height) for p in pipelines.values()}
    if len(sizes) > 1:
        raise ConfigError(f"the models' pictures have different sizes: {sorted(sizes)}")
    ((width, height),) = sizes
    kind = settings.kinds[0]
    prompts = draw_prompts(
        settings.prompts,
        width=width,
        height=height,
        seed=settings.seed,
        held_out=settings.held_out,
        manner=KINDS[kind].manner,
        colours=settings.colours,
    )
    counts = sorted(set(settings.step_counts))
    asked = [(sampler, steps) for sampler in settings.chosen for steps in counts]
    for sampler, steps in asked:
        pipeline = pipelines[sampler.model]
        pipeline.check(_settings(pipeline, settings, sampler, steps))
    points = []
    for i, (sampler, steps) in enumerate(asked):
        done = i * settings.prompts
        found = _counted(
            pipelines[sampler.model],
            settings,
            sampler,
            steps,
            prompts,
            lambda more, done=done: progress(done + more),
        )
        points.append(Point(sampler, steps, found))
    return SamplerEvaluation(points=tuple(points), prompts=settings.prompts)


def _settings(pipeline: Pipeline, settings: EvaluateSettings, sampler: Sampler, steps: int):
    chosen = {"steps": steps, "sampler": sampler.name or None}
    return override(pipeline.defaults, settings.guided | chosen)


def _counted(
    pipeline: Pipeline,
    settings: EvaluateSettings,
    sampler: Sampler,
    steps: int,
    prompts: Prompts,
    progress: Callable[[int], None],
) -> Counts:
    batch = min(settings.batch, settings.prompts)
    if pipeline.mesh is not None:
        batch = pipeline.executables.rows("denoise", batch)
    pictures = draw_pictures(
        pipeline,
        [caption.text for caption in prompts.captions],
        _settings(pipeline, settings, sampler, steps),
        batch=batch,
        progress=progress,
    )
    return count_right(prompts, from_bytes(pictures))


def print_samplers(evaluation: SamplerEvaluation) -> None:
    """A row for each sampler, a column for each number of steps."""
    from rich.console import Console
    from rich.table import Table

    counts = sorted({point.steps for point in evaluation.points})
    table = Table(
        title=f"pictures that show all that {evaluation.prompts} prompts say",
        caption="(colours, shapes of the objects that were asked for)",
    )
    table.add_column("steps")
    for steps in counts:
        table.add_column(str(steps), justify="right")
    for sampler in evaluation.samplers:
        cells = {
            point.steps: f"{point.rate(SHOWN):.2f} ({point.rate('colour'):.2f}, "
            f"{point.rate('shape'):.2f})"
            for point in evaluation.of(sampler)
        }
        table.add_row(str(sampler), *[cells.get(steps, "") for steps in counts])
    Console(soft_wrap=False).print(table)


def plot_samplers(evaluation: SamplerEvaluation, path: Path) -> None:
    """A line for each sampler, as a PNG. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install -e '.[train]'") from None
    assert SHOWN in ATTRIBUTES
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for sampler in evaluation.samplers:
        points: Sequence[Point] = evaluation.of(sampler)
        rates = [point.rate(SHOWN) for point in points]
        axes.plot([point.steps for point in points], rates, marker="o", label=str(sampler))
    counts = sorted({point.steps for point in evaluation.points})
    axes.set_xscale("log")
    axes.set_xticks(counts, map(str, counts))
    axes.minorticks_off()
    axes.set_ylim(0, 1)
    axes.set_xlabel("steps")
    axes.set_ylabel(f"right of {evaluation.prompts} pictures")
    axes.grid(alpha=0.3)
    axes.legend()
    with side_output(path, "plot") as part:
        figure.savefig(part, dpi=120, format="png", metadata=marker("plot"))
