"""What a run says, on stderr. Nobody listening, or a disk full of logs, does not end a run."""

from __future__ import annotations

import sys
from typing import Any

import jax

from fluxjax.terminal import Lenient, shown


def make_console() -> Any:
    """A rich console on stderr, quiet on all processes but the first."""
    from rich.console import Console

    stderr: Any = Lenient(sys.stderr)
    return Console(file=stderr, soft_wrap=True, quiet=jax.process_index() != 0)


def print_on(console: Any, text: str) -> None:
    """A line of its own, above a bar if there is one; control characters are shown."""
    console.print(shown(text), markup=False, highlight=False)


def say(text: str) -> None:
    """A line of its own, from process 0."""
    print_on(make_console(), text)
