"""Runs a step function to its end: metrics.jsonl, checkpoints, resume, and every way to stop.

Exit codes: 0 finished, or stopped by SIGTERM or Ctrl-C with all saved; 2 a mistake of the user, or
no room for the last checkpoint; 3 `Diverged`; 4 the watchdog's; 5 `hosts.ProcessLost`, or 134 where
JAX itself ends a process that has lost another.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fluxjax.atomic_write import write_bytes
from fluxjax.checkpoint.training_state import StateStore
from fluxjax.config import ConfigError
from fluxjax.parallel import hosts
from fluxjax.train.step import TrainState
from fluxjax.train.watchdog import Watchdog

Row = dict[str, Any]


class Stopped(SystemExit):
    """Asked to stop; the state is saved. Ends the process with code 0."""

    def __init__(self) -> None:
        super().__init__(0)


class Diverged(SystemExit):
    """Too many updates in a row were not finite; the last good checkpoint is whole. Code 3."""

    def __init__(self) -> None:
        super().__init__(3)


@contextmanager
def _stop_requests() -> Iterator[Callable[[int], bool]]:
    """Gives `asked(step)`: has SIGTERM or Ctrl-C come? A second one ends the process at once.

    On several processes it becomes true on all of them at the same step, whichever was asked.
    """
    several = jax.process_count() > 1
    caught: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if caught:
            os._exit(128 + number)
        caught.append(number)
        os.write(2, b"\nsaving after this step; a second signal ends the process at once\n")
        if several:  # SIGTERM belongs to JAX there, which tells the others
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(step: int) -> bool:
        return hosts.reached_stop(step) if several else bool(caught)

    numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield asked
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


class _Window:
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
        losses = np.asarray(jax.device_get(self.losses), np.float64)
        self.losses = []
        row: Row = {"step": step}
        if np.isfinite(losses).any():
            row["loss"] = float(losses[np.isfinite(losses)].mean())
        last = {k: float(v) for k, v in jax.device_get(dict(metrics)).items() if k != "loss"}
        row |= {k: v for k, v in last.items() if math.isfinite(v)}  # JSON knows no NaN
        row["skipped"] = self.skipped
        return row


def run(
    state: TrainState,
    advance: Callable[[TrainState, int], tuple[TrainState, dict[str, jax.Array]]],
    *,
    steps: int,
    folder: Path,
    save_seconds: float = 300.0,
    save_every: int = 0,
    log_every: int = 50,
    probe: Callable[[TrainState], dict[str, float]] | None = None,
    probe_every: int = 1000,
    patience: int = 50,
    keep: int = 2,
    identity: Mapping[str, str] | None = None,
    report: Callable[[Row], None] | None = None,
    hang_seconds: float = 1800.0,
) -> TrainState:
    """Advance `state` to `steps`, resuming from the newest whole checkpoint under `folder`.

    Consumes `state`, as a donated argument. Writes `folder/metrics.jsonl` and
    `folder/checkpoints/<step>`: every `save_seconds`, every `save_every` steps (0: never), and at
    the end. On several processes all call this alike and share `folder`.

    A row of metrics is written every `log_every` steps and with what `probe` found, which is called
    every `probe_every` steps and at the end.
    `identity`: what must not change over a resume (hashes of recipe, data ...). `report` gets each
    row of metrics on every process, may add to it before it is written, and replaces the printed
    line. `hang_seconds` without a step end the process with code 4 (ten times that for the first).
    Raises `Stopped` when asked to stop, once the state is saved; `Diverged` when `patience` updates
    in a row were not finite; ConfigError for another `identity`; OSError if the last save fails.
    """
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True, quiet=jax.process_index() != 0)
    identity, several = dict(identity or {}), jax.process_count() > 1

    def say(text: str) -> None:
        with suppress(OSError):  # a disk that is full of logs does not end the run
            console.print(text, markup=False, highlight=False)

    def row(step: int, metrics: Mapping[str, jax.Array], probed: bool) -> Row:
        made = window.row(step, metrics)
        made["steps_per_second"] = (step - start) / (time.monotonic() - begun)
        if probe is not None and probed:
            watchdog.beat(10 * hang_seconds)
            made |= probe(state)
        if report is not None:
            report(made)
        else:
            left = (steps - step) / made["steps_per_second"] / 60
            shown = "  ".join(f"{k} {v:.5g}" for k, v in made.items())
            say(f"{shown}  {left:.1f} min left")
        return made

    def due(step: int, logged: bool) -> bool:
        """Is it time to save? Clocks differ between hosts, so the first one's counts."""
        late = save_every > 0 and step % save_every == 0
        if several and not logged:
            return late
        return late or hosts.from_first(lambda: time.monotonic() - saved > save_seconds)

    def save(step: int, *, last: bool) -> None:
        watchdog.beat(10 * hang_seconds)
        try:
            store.wait()
        except OSError as error:
            say(f"warning: {error}")
        try:
            if store.latest != step:
                store.save(step, state, identity)
            if last:
                store.wait()
        except OSError as error:
            if last:
                raise
            say(f"warning: {error}; training goes on, the newest checkpoint is {store.latest}")

    with Watchdog(hang_seconds) as watchdog, hosts.others_may_end():
        hosts.agree(identity)
        folder.mkdir(parents=True, exist_ok=True)
        with StateStore(folder / "checkpoints", keep, say=say) as store, _stop_requests() as asked:
            state = _resume(store, state, identity, say)
            start = step = int(state.step)
            log = _Log(folder / "metrics.jsonl", start, say)
            window = _Window(state.skipped)
            saved = begun = time.monotonic()
            while step < steps:
                state, metrics = advance(state, step)
                step += 1
                window.add(metrics)
                probed = probe is not None and (step % probe_every == 0 or step == steps)
                logged = probed or step % log_every == 0 or step == steps
                if (logged or step % patience == 0) and window.count() >= patience:
                    store.close()
                    say(
                        f"error: {window.streak} updates in a row were not finite at step {step}; "
                        f"the last good checkpoint in {folder} is of step {store.latest}"
                    )
                    raise Diverged
                if logged:
                    log.write(row(step, metrics, probed))
                watchdog.beat()
                if asked(step):
                    save(step, last=True)
                    say(f"stopped; step {step} is saved in {folder}")
                    raise Stopped
                # In a streak of skipped updates the checkpoint before it is the good one.
                if due(step, logged) and step < steps and not window.count():
                    save(step, last=False)
                    saved = time.monotonic()
            save(step, last=True)
    return state


def _resume(store: StateStore, state: TrainState, identity: Mapping[str, str], say) -> TrainState:
    """The newest whole checkpoint in the place of `state`, or `state` where there is none."""
    saved = store.newest()
    if saved is None:
        return state
    if differing := hosts.differences(saved.identity, identity):
        raise ConfigError(
            f"{store.folder.parent} holds step {saved.step} of another run, which differs in "
            f"{', '.join(differing)}: go on with what it was started with, or give another folder"
        )
    template = jax.tree.map(_abstract, state)
    for leaf in jax.tree.leaves(state):  # two states may not fit on the devices
        leaf.delete()
    restored = store.restore(template)
    assert restored is not None
    say(f"resumed {store.folder.parent} at step {restored[0]}")
    return restored[1]


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


class _Log:
    """metrics.jsonl: rows after the step that is resumed, of a run that was killed, are dropped."""

    def __init__(self, path: Path, start: int, say: Callable[[str], None]) -> None:
        self._path, self._say, self._first = path, say, jax.process_index() == 0
        if self._first and path.is_file():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines()
                    if _step_of(line) <= start]  # fmt: skip
            write_bytes(path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, row: Row) -> None:
        """A disk that is full costs rows, not the run."""
        if self._first:
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                self._say(f"warning: {self._path}: {error.strerror}")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
