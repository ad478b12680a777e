"""python -m fluxjax.diff golden | live | bench: how far ours is from PyTorch, and how fast."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from fluxjax import cli

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None, prog: str = "python -m fluxjax.diff") -> int:
    from fluxjax.command_options import parse_options
    from fluxjax.diff.commands import VERBS, Command, execute

    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
        raise ValueError(f"{arguments[0]!r} is none of {', '.join(VERBS)}")
    about = "How far ours is from PyTorch, and how fast."
    return execute(parse_options(Command, arguments, prog, description=about))


if __name__ == "__main__":
    cli.run(main)
