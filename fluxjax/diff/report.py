"""What a comparison found: one row per tensor, the table, its JSON and its plot."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fluxjax.side_output import marker, side_output


@dataclass(frozen=True, kw_only=True)
class Row:
    """One compared tensor. `own_error` is PyTorch's own error in the same dtype, if known."""

    tensor: str
    shape: tuple[int, ...]
    max_abs: float
    relative_l2: float
    cosine: float
    bound: float
    own_error: float | None = None
    remark: str = ""

    @property
    def passed(self) -> bool:
        # A NaN compares false, so it fails.
        return not self.remark and self.relative_l2 <= self.bound

    @property
    def verdict(self) -> str:
        return "ok" if self.passed else self.remark or "FAIL"


@dataclass(frozen=True, kw_only=True)
class Report:
    """All rows of one comparison, in the order in which PyTorch computed them."""

    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def first_failure(self) -> Row | None:
        """The first row beyond its bound: every earlier tensor agrees, so the fault lies there."""
        return next((row for row in self.rows if not row.passed), None)


def compare(
    tensor: str,
    ours: np.ndarray,
    expected: np.ndarray,
    *,
    bound: float,
    own_error: float | None = None,
) -> Row:
    """Measure `ours` against `expected`; sums are float64. A shape mismatch is a failing row."""
    max_abs = error = cosine = math.nan
    remark = f"ours is {tuple(ours.shape)}"
    if ours.shape == expected.shape:
        a, b = (np.asarray(x).astype(np.float64).ravel() for x in (ours, expected))
        max_abs = float(np.max(np.abs(a - b), initial=0.0))
        error = relative_l2(a, b)
        cosine = _ratio(float(a @ b), _norm(a) * _norm(b), both_zero=1.0)
        remark = ""
    return Row(
        tensor=tensor,
        shape=tuple(expected.shape),
        max_abs=max_abs,
        relative_l2=error,
        cosine=cosine,
        bound=bound,
        own_error=own_error,
        remark=remark,
    )


def relative_l2(ours: np.ndarray, expected: np.ndarray) -> float:
    """||ours - expected|| / ||expected|| in float64."""
    a, b = (np.asarray(x).astype(np.float64).ravel() for x in (ours, expected))
    return _ratio(_norm(a - b), _norm(b))


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x))


def _ratio(top: float, bottom: float, both_zero: float = 0.0) -> float:
    if bottom == 0:
        return both_zero if top == 0 else math.inf
    return float(top / bottom)


def to_json(reports: list[Report]) -> str:
    """The reports as JSON; numbers that JSON lacks (NaN, infinity) become null."""

    def row(r: Row) -> dict:
        values = dataclasses.asdict(r) | {"passed": r.passed, "verdict": r.verdict}
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }

    def report(r: Report) -> dict:
        first = r.first_failure
        return {
            "title": r.title,
            "passed": r.passed,
            "first_failure": first and first.tensor,
            "rows": [row(x) for x in r.rows],
            "notes": list(r.notes),
        }

    return json.dumps([report(r) for r in reports], indent=1, allow_nan=False)


def print_report(report: Report, console: Console) -> None:
    """The table, the notes, and one closing line with the verdict."""
    table = Table(title=escape(report.title), title_justify="left", title_style="bold")
    table.add_column("tensor", overflow="fold")
    numbers = ["shape", "max abs", "relative L2", "cosine"]
    own = any(row.own_error is not None for row in report.rows)
    for name in [*numbers, *(["PyTorch's own"] if own else [])]:
        table.add_column(name, justify="right")
    table.add_column("verdict", overflow="fold")
    for row in report.rows:
        cells = [
            row.tensor,
            "x".join(map(str, row.shape)) or "scalar",
            f"{row.max_abs:.2e}",
            f"{row.relative_l2:.2e}",
            f"{row.cosine:.8f}",
        ]
        if own:
            cells.append("" if row.own_error is None else f"{row.own_error:.2e}")
        style = "" if row.passed else "bold red"
        table.add_row(*map(escape, cells), escape(row.verdict), style=style)
    if not console.is_terminal:  # who reads a pipe or a file searches it for whole names
        wide = console.options.update(width=1000)
        console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)
    for note in report.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)
    console.print(escape(closing_line(report)), highlight=False, soft_wrap=True)


def closing_line(report: Report) -> str:
    """Passed or failed, in one sentence."""
    if not report.rows:
        return f"{report.title}: FAIL, nothing was compared."
    if (bad := report.first_failure) is None:
        worst = max(report.rows, key=lambda row: row.relative_l2)
        return (
            f"{report.title}: all {len(report.rows)} tensors agree; "
            f"the largest relative L2 is {worst.relative_l2:.2e} at {worst.tensor}."
        )
    failed = sum(not row.passed for row in report.rows)
    how = bad.remark or f"relative L2 {bad.relative_l2:.2e}, bound {bad.bound:.2e}"
    return (
        f"{report.title}: FAIL, {failed} of {len(report.rows)} tensors are beyond their bound; "
        f"the first is {bad.tensor} ({how})."
    )


def plot_report(report: Report, path: Path) -> None:
    """Draw the error of every tensor, in execution order, on a log axis, and save it as `path`.

    Raises what `side_output.check_side_output` raises.
    """
    # Late: drawing is an option, and matplotlib takes longer to import than a table to print.
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'fluxjax[train]'") from None

    floor = 1e-9  # identical tensors have error zero, which a log axis cannot show
    rows = report.rows
    x = np.arange(len(rows))
    errors = np.array([r.relative_l2 for r in rows], float)
    errors = np.clip(np.nan_to_num(errors, nan=1.0, posinf=1.0), floor, None)
    good = np.array([r.passed for r in rows], bool)

    figure = Figure(figsize=(max(8.0, min(24.0, 0.06 * len(rows) + 4)), 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log")
    axes.plot(x, errors, color="0.8", linewidth=0.8, zorder=1)
    axes.scatter(x[good], errors[good], s=14, color="tab:blue", label="within its bound", zorder=2)
    if not good.all():
        bad = ~good
        axes.scatter(x[bad], errors[bad], s=18, color="tab:red", label="beyond its bound", zorder=3)
    if any(r.own_error is not None for r in rows):
        own = [max(r.own_error or floor, floor) for r in rows]
        axes.plot(x, own, color="tab:orange", linewidth=1.2, label="PyTorch's own error", zorder=1)
    bounds = [r.bound for r in rows]
    axes.plot(x, bounds, color="0.3", linestyle="--", linewidth=1, label="bound", zorder=1)

    groups = _groups([r.tensor for r in rows])
    for k, (_, start, end) in enumerate(groups):
        if k % 2:
            axes.axvspan(start - 0.5, end + 0.5, color="0.95", zorder=0)
    labelled = [g for g in groups if g[2] - g[1] + 1 >= len(rows) / 40] or groups
    axes.set_xticks([(start + end) / 2 for _, start, end in labelled])
    axes.set_xticklabels([name for name, _, _ in labelled], rotation=60, ha="right", fontsize=7)
    axes.set_xlim(-1, len(rows))
    axes.set_ylabel("relative L2 error (identical tensors at 1e-9)")
    title = report.title
    if (first := report.first_failure) is not None:
        title += f"\nfirst beyond its bound: {first.tensor}"
        axes.axvline(rows.index(first), color="tab:red", linewidth=0.8, zorder=0)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", color="0.9", zorder=0)
    axes.legend(fontsize=8, loc="best")
    with side_output(path, "plot") as part:
        figure.savefig(part, format="png", dpi=130, metadata=marker("plot"))


def _groups(names: list[str]) -> list[tuple[str, int, int]]:
    """Runs of neighbours with the same leading words (down to the block): (name, first, last)."""
    runs: list[tuple[str, int, int]] = []
    for index, name in enumerate(names):
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        head = ".".join(parts[: numbers[0] + 1] if numbers else parts[:1]).split(" ")[0]
        if runs and runs[-1][0] == head:
            runs[-1] = (head, runs[-1][1], index)
        else:
            runs.append((head, index, index))
    return runs
