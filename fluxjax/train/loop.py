"""Runs a step function to its end: metrics.jsonl, checkpoints, resume, and every way to stop.

Exit codes: 0 finished, or stopped by SIGTERM or Ctrl-C with all saved; 2 a mistake of the user, or
no room for the last checkpoint; 3 `Diverged`; 4 the watchdog's; 5 `hosts.ProcessLost`, or 134 where
JAX itself ends a process that has lost another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from fluxjax.atomic_write import remove_leftovers
from fluxjax.checkpoint.training_state import StateStore
from fluxjax.cli import sentence
from fluxjax.config import ConfigError
from fluxjax.lock import locked
from fluxjax.parallel import hosts
from fluxjax.train import console
from fluxjax.train.metrics import MetricsFile, Row, Window
from fluxjax.train.step import TrainState
from fluxjax.train.stop_requests import stop_requests
from fluxjax.train.watchdog import Watchdog

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
_LOCK = ".lock"


class Stopped(SystemExit):
    """Asked to stop; the state is saved. Ends the process with code 0."""

    def __init__(self) -> None:
        super().__init__(0)


class Diverged(SystemExit):
    """Too many updates in a row were not finite, or none was. Ends the process with code 3."""

    def __init__(self) -> None:
        super().__init__(3)


@contextmanager
def run_folder(folder: Path) -> Iterator[Path]:
    """The folder of a run, made if it is not there, and locked against other runs.

    Process 0 holds the lock, which dies with it; the others of the same run share the folder.
    Raises OSError (`lock.InUse`) on every process if another run has it.
    """
    held = locked(folder / _LOCK, str(folder))
    missing = [path for path in (folder, *folder.parents) if not path.exists()]

    def take() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        held.__enter__()
        for names in (".*", "validation/.*"):
            remove_leftovers(folder, names)

    hosts.from_first(take)
    try:
        yield folder
    finally:
        if jax.process_index() == 0:
            held.__exit__(None, None, None)
            with suppress(OSError):  # a run that was refused leaves nothing
                for path in (folder, *missing[1:]):
                    path.rmdir()


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How far a run goes, and what it does on the way; intervals are in steps, 0 is never."""

    steps: int
    folder: Path
    """Shared by all processes; receives metrics.jsonl and checkpoints/."""
    log_every: int = 50
    """Between rows of metrics; one is also written with what `probe` found."""
    probe_every: int = 1000
    save_every: int = 0
    save_seconds: float = 300.0
    """Between checkpoints; the last step has one too."""
    export_every: int = 0
    keep: int = 2
    """The newest so many checkpoints stay."""
    patience: int = 50
    """Updates in a row that were not finite end the run."""
    hang_seconds: float = 1800.0
    """A step that takes longer ends the process with code 4; the first has ten times that."""


def _nothing(*_: Any) -> dict[str, float]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the owner of a run adds to it. All processes call all of them at the same steps.

    Their OSErrors, a full disk above all, are said and do not end the run.
    """

    started: Callable[[], Any] = _nothing
    """Once it is certain that this run goes on in its folder."""
    probe: Callable[[TrainState], dict[str, float]] | None = None
    """Numbers for the row of metrics, every `probe_every` steps and at the end."""
    report: Callable[[Row], None] | None = None
    """Gets each row, may add to it before it is written, and replaces the printed line."""
    export: Callable[[TrainState], Any] = _nothing
    """Every `export_every` steps."""
    stopped: Callable[[TrainState], Any] = _nothing
    """When the run was asked to stop and its state is saved."""
    say: Callable[[str], None] = console.say


class Run:
    """One run: `Run(settings, advance).to_end(state)`."""

    store: StateStore
    asked: Callable[[int], bool]
    metrics: MetricsFile
    window: Window
    start: int  # the step that this process began with
    begun: float  # when it did
    saved: float  # when it last saved

    def __init__(
        self,
        settings: RunSettings,
        advance: Callable[[TrainState, int], tuple[TrainState, dict[str, jax.Array]]],
        hooks: Hooks | None = None,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        """`advance(state, index)` does one step. `identity`: what must be the same on all processes
        and over a resume (what the recipe says, hashes of data and weights)."""
        self.settings, self.advance, self.hooks = settings, advance, hooks or Hooks()
        self.identity = dict(identity or {})
        self.say = self.hooks.say
        self.watchdog = Watchdog(settings.hang_seconds)

    def to_end(self, state: TrainState) -> TrainState:
        """Advance `state` to `settings.steps`, resuming from the newest whole checkpoint.

        Consumes `state`, as a donated argument. On several processes all call this alike. Hold
        `run_folder` while it runs.
        Raises `Stopped` when asked to stop, once the state is saved; `Diverged` when `patience`
        updates in a row were not finite, or none at the end; ConfigError for another `identity`;
        OSError if there is no space for a checkpoint, or the last save fails.
        """
        folder = self.settings.folder
        with self.watchdog, hosts.others_may_end():
            hosts.agree(self.identity)
            folder.mkdir(parents=True, exist_ok=True)
            with (
                StateStore(folder / CHECKPOINTS, self.settings.keep, say=self.say) as store,
                stop_requests() as asked,
            ):
                self.store, self.asked = store, asked
                state = self._resumed(state)
                if int(state.step) < self.settings.steps:  # in hours nothing could be saved either
                    hosts.from_first(lambda: store.require_room(state))
                self.hooks.started()
                return self._steps(state)

    def _steps(self, state: TrainState) -> TrainState:
        settings = self.settings
        step = self.start = int(state.step)
        self.metrics = MetricsFile(settings.folder / METRICS, step, self.say)
        self.window = Window(state.skipped)
        self.saved = self.begun = time.monotonic()
        while step < settings.steps:
            state, numbers = self.advance(state, step)
            step += 1
            self.window.add(numbers)
            logged = self._logged(step)
            if logged or step % settings.patience == 0:
                self._give_up_if_diverged(step)
            if logged:
                self._log(state, step, numbers)
            self.watchdog.beat()
            if self.asked(step):
                self._stop(state, step)
            # In a streak of skipped updates the checkpoint before it is the good one.
            if step < settings.steps and self._save_due(step, logged) and not self.window.count():
                self._save(state, step)
            if _due(step, settings.export_every) and step < settings.steps:
                self._aside(self.hooks.export, state)
        if step and int(state.skipped) >= step:
            self.say(f"error: none of the {step} updates was finite: nothing was learnt")
            raise Diverged
        self._save(state, step, last=True)
        return state

    def _resumed(self, state: TrainState) -> TrainState:
        """The newest whole checkpoint in the place of `state`, or `state` where there is none."""
        store, folder = self.store, self.settings.folder
        saved = store.newest()
        if saved is None:
            return state
        if differing := hosts.differences(saved.identity, self.identity):
            raise ConfigError(
                f"{folder} holds step {saved.step} of another run, which differs in "
                f"{hosts.listed(differing)}: go on with what it was started with, or give another "
                "folder"
            )
        template = jax.tree.map(_abstract, state)
        for leaf in jax.tree.leaves(state):  # two states may not fit on the devices
            leaf.delete()
        restored = store.restore(template)
        assert restored is not None
        step, state = restored
        if int(state.step) != step:
            raise ValueError(
                f"{folder / CHECKPOINTS} is damaged: the state of step {int(state.step)} is called "
                f"{step}"
            )
        self.say(f"resumed {folder} at step {step}")
        return state

    def _logged(self, step: int) -> bool:
        last = step == self.settings.steps
        return last or _due(step, self.settings.log_every) or self._probed(step)

    def _probed(self, step: int) -> bool:
        due = step == self.settings.steps or _due(step, self.settings.probe_every)
        return self.hooks.probe is not None and due

    def _log(self, state: TrainState, step: int, numbers: Mapping[str, jax.Array]) -> None:
        row = self.window.row(step, numbers)
        row["steps_per_second"] = (step - self.start) / (time.monotonic() - self.begun)
        if self.hooks.probe is not None and self._probed(step):
            row |= self._aside(self.hooks.probe, state) or {}
        if self.hooks.report is not None:
            self.hooks.report(row)
        else:
            left = (self.settings.steps - step) / row["steps_per_second"] / 60
            shown = "  ".join(f"{name} {value:.5g}" for name, value in row.items())
            self.say(f"{shown}  {left:.1f} min left")
        self.metrics.write(row)

    def _give_up_if_diverged(self, step: int) -> None:
        streak = self.window.count()
        if streak >= self.settings.patience:
            self.store.close()
            latest = self.store.latest
            good = (
                "there is no checkpoint"
                if latest is None
                else (f"the last good checkpoint in {self.settings.folder} is of step {latest}")
            )
            self.say(f"error: {streak} updates in a row were not finite at step {step}; {good}")
            raise Diverged

    def _stop(self, state: TrainState, step: int) -> None:
        self._save(state, step, last=True)
        if int(state.skipped) < step:
            self._aside(self.hooks.stopped, state)
        self.say(f"stopped; step {step} is saved in {self.settings.folder}")
        raise Stopped

    def _aside(self, hook: Callable[[TrainState], Any], state: TrainState) -> Any:
        """Beside the training: it may take long, and where it finds no room the run goes on."""
        self.watchdog.beat(10 * self.settings.hang_seconds)
        try:
            return hook(state)
        except hosts.ProcessLost:
            raise
        except OSError as error:
            self.say(f"warning: {sentence(error)}; training goes on")
        finally:
            self.watchdog.beat()

    def _save_due(self, step: int, logged: bool) -> bool:
        """Is it time to save? Clocks differ between hosts, so the first one's counts."""
        late = _due(step, self.settings.save_every)
        if jax.process_count() > 1 and not logged:
            return late
        return late or hosts.from_first(
            lambda: time.monotonic() - self.saved > self.settings.save_seconds
        )

    def _save(self, state: TrainState, step: int, *, last: bool = False) -> None:
        self.watchdog.beat(10 * self.settings.hang_seconds)
        self.saved = time.monotonic()
        try:
            self.store.wait()
        except OSError as error:
            self.say(f"warning: {error}")
        try:
            if self.store.latest != step:
                self.store.save(step, state, self.identity)
            if last:
                self.store.wait()
        except OSError as error:
            if last:
                raise
            latest = self.store.latest
            self.say(f"warning: {error}; training goes on, the newest checkpoint is {latest}")


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
