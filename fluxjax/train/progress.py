"""What a run says while it goes on: a bar on a terminal, lines elsewhere, TensorBoard if asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from fluxjax.chips import find_chip
from fluxjax.cli import sentence
from fluxjax.config import ConfigError
from fluxjax.train.console import make_console, print_on

SHOWN = ("loss", "validation_loss", "gradient_norm", "learning_rate", "skipped")


class Progress:
    """Called with one row of metrics per interval, to which it adds speed and what is left.

    The caller adds each step's pictures or clips, of all processes, to `images`, their useful FLOPs
    to `flops`, the seconds in which devices waited for data to `waited`, and those that are no
    training to `paused`. Only process 0 speaks. Use as a context, which ends the bar.
    """

    def __init__(self, steps: int, *, tensorboard: Path | None = None) -> None:
        chip = find_chip(jax.devices()[0].device_kind)
        self.steps, self.images = steps, 0
        self.peak = chip.tera_flops * 1e12 * jax.device_count() if chip else None
        self.speaks = jax.process_index() == 0
        self.flops = self.waited = self.paused = 0.0
        self._mark: tuple[int, float] | None = None
        self._bar: Any = None
        self._board: Any = _open_board(tensorboard) if tensorboard and self.speaks else None

    def __enter__(self) -> Progress:
        self._console = make_console()
        if self.speaks and self._console.is_terminal:
            self._bar = _bar(self._console)
            self._bar.start()
            self._task = self._bar.add_task("compiling", total=self.steps, shown="")
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._aside(self._board.close)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        print_on(self._console, text)

    def __call__(self, row: dict[str, Any]) -> None:
        """Adds images_per_second, mfu, data_share and minutes_left to `row`, and shows it."""
        step, now = int(row["step"]), time.perf_counter()
        if self._mark is not None and step > self._mark[0]:
            count, seconds = step - self._mark[0], now - self._mark[1] - self.paused
            row["images_per_second"] = self.images / seconds
            if self.peak:
                row["mfu"] = self.flops / seconds / self.peak
            row["data_share"] = self.waited / seconds
            row["minutes_left"] = (self.steps - step) * seconds / count / 60
        # The first row only starts the clock: its steps were compiled.
        self._mark = (step, now)
        self.images = 0
        self.flops = self.waited = self.paused = 0.0
        if not self.speaks:
            return
        if self._board is not None:
            self._aside(lambda: self._write_board(row, step))
        shown = describe(row)
        if self._bar is None:
            self.say(f"step {step}/{self.steps}  {shown}")
        else:
            self._bar.update(self._task, description="training", completed=step, shown=shown)

    def _write_board(self, row: dict[str, Any], step: int) -> None:
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, step)

    def _aside(self, write: Callable[[], None]) -> None:
        """TensorBoard's files are no reason to end a run."""
        try:
            write()
        except OSError as error:
            self.say(f"warning: TensorBoard: {sentence(error)}")


class Filling:
    """Says how far pictures are checked, and captions and pictures encoded, and how fast.

    Called as `report(what, done, due)` with `what` such as `pictures encoded`; a new `what` begins
    a new count. A bar on a terminal; elsewhere a line at the end of each count and every `seconds`.
    Only process 0 speaks. Use as a context, which ends the bar.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        self.seconds = seconds
        self._what = ""
        self._bar: Any = None

    def __enter__(self) -> Filling:
        self._console = make_console()
        if jax.process_index() == 0 and self._console.is_terminal:
            self._bar = _bar(self._console)
            self._bar.start()
        self._begun = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: int, due: int) -> None:
        now = time.perf_counter()
        if what != self._what:
            # What came before this count is no part of it, but the first of it was worked on.
            self._what, self._said, self._start = what, now, self._begun
            if self._bar is not None:
                self._task = self._bar.add_task(what, total=due, shown="")
        self._begun = now
        speed = f"{done / max(now - self._start, 1e-9):.3g} {what.split()[0]}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=due, shown=speed)
        elif done == due or now - self._said >= self.seconds:
            self._said = now
            print_on(self._console, f"{what}: {done} of {due}  {speed}")


def describe(row: dict[str, Any]) -> str:
    """The row in words and short numbers."""
    parts = [f"{name.replace('_', ' ')} {row[name]:.4g}" for name in SHOWN if row.get(name)]
    if "images_per_second" in row:
        parts.append(f"{row['images_per_second']:.3g} images/s")
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.1%}")
    if "minutes_left" in row:
        minutes = round(row["minutes_left"])
        left = f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
        parts.append(f"{left} left")
    return "  ".join(parts)


def _bar(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TextColumn("{task.fields[shown]}"), console=console)


def _open_board(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("TensorBoard needs tensorboardX: pip install -e '.[train]'") from None
    return SummaryWriter(str(folder))
