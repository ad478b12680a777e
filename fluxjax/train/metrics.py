"""metrics.jsonl: a row of numbers per interval of steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fluxjax.atomic_write import write_bytes

Row = dict[str, Any]


class MetricsFile:
    """Rows are appended by process 0. What cannot be read or written costs rows, not the run.

    Rows after step `start`, of a run that was killed, and lines that are no rows are dropped.
    """

    def __init__(self, path: Path, start: int, say: Callable[[str], None]) -> None:
        self._path, self._say, self._first = path, say, jax.process_index() == 0
        if self._first and path.exists():
            try:
                self._clean(start)
            except OSError as error:
                say(f"warning: {path}: {error.strerror}")

    def _clean(self, start: int) -> None:
        rows = [(line, parse_row(line)) for line in self._path.read_bytes().splitlines()]
        kept = [line for line, row in rows if row is not None and row["step"] <= start]
        unreadable = sum(row is None for _, row in rows)
        if unreadable:
            self._say(f"warning: {self._path}: {unreadable} line(s) that are no rows are dropped")
        if len(kept) < len(rows):
            write_bytes(self._path, b"".join(line + b"\n" for line in kept))

    def write(self, row: Row) -> None:
        if self._first:
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                self._say(f"warning: {self._path}: {error.strerror}")


def parse_row(line: bytes) -> Row | None:
    """A row of finite numbers, or None for a line that was cut by a crash or is none."""
    try:
        row = json.loads(line)
        if isinstance(row, dict) and "step" in row and all(map(math.isfinite, row.values())):
            return row
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass
    return None


def read_metrics(path: Path) -> list[Row]:
    """The rows in order of steps; of a step that was run twice, after a resume, the last."""
    rows = filter(None, map(parse_row, path.read_bytes().splitlines()))
    by_step = {int(row["step"]): row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


class Window:
    """Metrics since the last row, and how many updates in a row have been skipped."""

    def __init__(self, skipped: jax.Array) -> None:
        self.skipped, self.streak = int(skipped), 0
        self.losses: list[jax.Array] = []
        self.counts: list[jax.Array] = []

    def add(self, metrics: Mapping[str, jax.Array]) -> None:
        self.losses.append(metrics["loss"])
        self.counts.append(metrics["skipped"])

    def count(self) -> int:
        """The streak as of now; waits for the device."""
        for count in map(int, jax.device_get(self.counts)):
            self.streak = self.streak + 1 if count > self.skipped else 0
            self.skipped = count
        self.counts = []
        return self.streak

    def row(self, step: int, metrics: Mapping[str, jax.Array]) -> Row:
        """The mean of the losses that are finite, and the last of every other metric."""
        self.count()
        losses = np.asarray(jax.device_get(self.losses), np.float64)
        self.losses = []
        row: Row = {"step": step}
        if np.isfinite(losses).any():
            row["loss"] = float(losses[np.isfinite(losses)].mean())
        last = {k: float(v) for k, v in jax.device_get(dict(metrics)).items() if k != "loss"}
        row |= {k: v for k, v in last.items() if math.isfinite(v)}  # JSON knows no NaN
        row["skipped"] = self.skipped
        return row
