"""The curve of a run as a picture, from its metrics.jsonl."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fluxjax.atomic_write import whole_or_nothing
from fluxjax.config import ConfigError
from fluxjax.train.metrics import read_metrics


@contextmanager
def _errors_alone() -> Iterator[None]:
    """matplotlib warns twice of a home that cannot be written, which does not matter here."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@_errors_alone()
def draw_curve(metrics: Path, path: Path) -> Path:
    """Loss, validation loss, gradient norm and learning rate over steps, as a PNG at `path`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("curves need matplotlib: pip install -e '.[train]'") from None
    rows = read_metrics(metrics)
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _line(top, rows, "loss", "training", "tab:blue", alpha=0.45)
    losses = [row for row in rows if row.get("loss") is not None]
    means = smoothed([row["loss"] for row in losses])
    smooth = [{**row, "loss": mean} for row, mean in zip(losses, means, strict=True)]
    _line(top, smooth, "loss", "training, smoothed", "tab:blue")
    _line(top, rows, "validation_loss", "validation, fixed noise", "tab:orange", marker="o")
    top.set_ylabel("loss")
    top.legend()
    _line(bottom, rows, "gradient_norm", "gradient norm", "tab:green")
    bottom.set_ylabel("gradient norm")
    bottom.set_xlabel("step")
    if any("learning_rate" in row for row in rows):
        rate = bottom.twinx()
        _line(rate, rows, "learning_rate", "learning rate", "tab:red")
        rate.set_ylabel("learning rate", color="tab:red")
        rate.set_ylim(bottom=0)
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    with whole_or_nothing(path) as part:
        figure.savefig(part, dpi=120, format="png")
    return path


def smoothed(values: list[float]) -> list[float]:
    """Each as the mean of its neighbours, as many before as after, a twentieth of all at most.

    The mean lies among the data everywhere; one that trails behind lies above a falling loss.
    """
    reach = len(values) // 20 + 1
    means = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        window = values[i - near : i + near + 1]
        means.append(sum(window) / len(window))
    return means


def _line(axes: Any, rows: list[dict[str, Any]], name: str, label: str, colour: str, **style: Any):
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=colour, **style)
