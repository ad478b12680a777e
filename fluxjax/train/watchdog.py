"""Ends a run whose step hangs: a collective that waits for ever looks like work from outside."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from fluxjax.terminal import say

HUNG = 4  # the exit code


class Watchdog:
    """Expects `beat()` every `seconds`; `start` seconds are granted before the first, to compile.

    When it stays away, the stacks of all threads go to stderr and the process ends with `HUNG`.
    Use as a context.
    """

    def __init__(self, seconds: float, start: float | None = None) -> None:
        self.seconds = seconds
        self._beat, self._within = time.monotonic(), start or 10 * seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._beat = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, within: float | None = None) -> None:
        """A step is done; the next one may take `within` seconds, else the usual."""
        self._beat, self._within = time.monotonic(), within or self.seconds

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            silent = time.monotonic() - self._beat
            if silent > self._within:
                say(f"error: no step within {silent:.1f} s; stacks follow")
                with suppress(OSError, ValueError):  # a full disk must not keep it alive
                    faulthandler.dump_traceback(file=_stderr(), all_threads=True)
                os._exit(HUNG)
            # Where native code hangs with the interpreter locked, this thread never runs again:
            # then a timer without Python ends the process, with exit code 1.
            left = self._within - silent + max(5.0, self.seconds)
            faulthandler.dump_traceback_later(left, exit=True, file=_stderr())


def _stderr() -> Any:
    """The real one: faulthandler writes to a file descriptor."""
    return sys.__stderr__ or 2
