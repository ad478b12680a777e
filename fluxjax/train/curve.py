"""The curve of a run as a picture, from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fluxjax.config import ConfigError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows in order of steps; of a step that was run twice, after a resume, the last."""
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a line cut by a crash
        if isinstance(row, dict) and "step" in row:
            rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]


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
    smooth, average = [], None
    for row in (row for row in rows if "loss" in row):
        average = row["loss"] if average is None else 0.9 * average + 0.1 * row["loss"]
        smooth.append({"step": row["step"], "loss": average})
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
    figure.savefig(path, dpi=120)
    return path


def _line(axes: Any, rows: list[dict[str, Any]], name: str, label: str, colour: str, **style: Any):
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=colour, **style)
