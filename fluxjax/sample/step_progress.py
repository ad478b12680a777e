"""How far a run is: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fluxjax.terminal import say

EVERY = 5.0  # seconds between lines


@contextmanager
def step_progress(
    steps: int, what: str, *, quiet: bool = False
) -> Iterator[Callable[[int], None] | None]:
    """What `Pipeline.draw` calls with the number of steps done; None where nothing is shown.

    All processes run the same parts; the first one shows them.
    """
    import jax

    from fluxjax.parallel import hosts

    if quiet:
        yield None
        return
    terminal = hosts.from_first(sys.stderr.isatty)
    if jax.process_index() > 0:
        yield lambda done: None
        return
    with (_bar if terminal else _lines)(steps, what) as report:
        yield report


@contextmanager
def _bar(steps: int, what: str) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, pace = bar.add_task(f"{what}: loading and compiling", total=None), _Pace()

        def report(done: int) -> None:
            said = f"{what}: steps{pace(done)}"
            bar.update(task, description=said, total=steps, completed=done)

        yield report


@contextmanager
def _lines(steps: int, what: str) -> Iterator[Callable[[int], None]]:
    begun, ended, pace = time.perf_counter(), threading.Event(), _Pace()
    done, each = 0, ""

    def report(number: int) -> None:
        nonlocal done, each
        done, each = number, pace(number)

    def speak() -> None:
        while not ended.wait(EVERY):
            state = "loading and compiling"
            if done:
                state = f"step {done} of {steps}{each}" if done < steps else "decoding"
            say(f"{what}: {state}, {time.perf_counter() - begun:.0f} s")

    speaker = threading.Thread(target=speak, name="progress", daemon=True)
    speaker.start()
    try:
        yield report
    finally:
        ended.set()
        speaker.join()


class _Pace:
    """What a step takes, in words, from the second report on: the first waits for its program."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int) -> str:
        now = time.perf_counter()
        if self._first is None:
            self._first = done, now
        number, begun = self._first
        return f", {(now - begun) / (done - number):.2g} s a step" if done > number else ""
