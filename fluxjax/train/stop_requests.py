"""SIGTERM and Ctrl-C as questions that a run asks after each step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

from fluxjax.parallel import hosts


@contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Gives `asked(step)`: has SIGTERM or Ctrl-C come? A second one ends the process at once.

    On several processes it becomes true on all of them at the same step, whichever was asked.
    """
    several = jax.process_count() > 1
    caught: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if caught:
            os._exit(128 + number)
        caught.append(number)
        with suppress(OSError):
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
