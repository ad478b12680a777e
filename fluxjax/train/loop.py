"""Runs a step function to its end: progress, metrics.jsonl, checkpoints, resume."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fluxjax.train.step import TrainState


class Diverged(RuntimeError):
    """Too many updates in a row were not finite; the last checkpoint is whole."""


@contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT; a second one ends the process at once."""
    caught: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    previous = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def run(
    state: TrainState,
    advance: Callable[[TrainState, int], tuple[TrainState, dict[str, jax.Array]]],
    *,
    steps: int,
    folder: Path,
    save_seconds: float = 300.0,
    log_every: int = 50,
    probe: Callable[[TrainState], dict[str, float]] | None = None,
    probe_every: int = 1000,
    patience: int = 50,
) -> TrainState:
    """Advance `state` to `steps`, resuming from the newest checkpoint under `folder`.

    Writes `folder/metrics.jsonl` and `folder/checkpoints/<step>`. Raises `Diverged` when `patience`
    updates in a row were not finite, and KeyboardInterrupt after saving when asked to stop.
    """
    import orbax.checkpoint as ocp
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    with ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options) as manager:
        if (latest := manager.latest_step()) is not None:
            template = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(latest, args=ocp.args.StandardRestore(template))
            state = TrainState(*state)
            console.print(f"resumed {folder} at step {latest}")

        def save(step: int) -> None:
            if manager.latest_step() != step:
                manager.save(step, args=ocp.args.StandardSave(state))
                manager.wait_until_finished()

        start = step = int(state.step)
        saved = begun = time.monotonic()
        losses: list[jax.Array] = []
        with _stop_on_signal() as stop, (folder / "metrics.jsonl").open("a") as log:
            while step < steps:
                state, metrics = advance(state, step)
                losses.append(metrics["loss"])
                step += 1
                if step % log_every == 0 or step == steps:
                    window = np.asarray(jax.device_get(losses), np.float64)
                    losses = []
                    if not np.isfinite(window[-patience:]).any():
                        raise Diverged(f"the loss was not finite for the last {len(window)} steps")
                    rate = (step - start) / (time.monotonic() - begun)
                    row = {"step": step, "loss": float(window.mean()), "steps_per_second": rate}
                    row["gradient_norm"] = float(metrics["gradient_norm"])
                    row["skipped"] = int(metrics["skipped"])
                    if probe is not None and (step % probe_every == 0 or step == steps):
                        row |= probe(state)
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    left = (steps - step) / rate / 60
                    shown = "  ".join(f"{k} {v:.5g}" for k, v in row.items())
                    console.print(f"{shown}  {left:.1f} min left")
                if stop or time.monotonic() - saved > save_seconds:
                    save(step)
                    saved = time.monotonic()
                    if stop:
                        console.print(f"stopped; step {step} is saved in {folder}")
                        raise KeyboardInterrupt
        save(step)
    return state
