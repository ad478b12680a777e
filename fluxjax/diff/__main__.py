"""python -m fluxjax.diff golden | live | bench: how far ours is from PyTorch, and how fast."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from fluxjax import cli

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None, prog: str = "python -m fluxjax.diff") -> int:
    import tyro

    from fluxjax.diff.commands import Bench, Golden, Live, execute

    command = tyro.extras.subcommand_cli_from_dict(
        {"golden": Golden, "live": Live, "bench": Bench},
        args=sys.argv[1:] if arguments is None else arguments,
        prog=prog,
        description="How far ours is from PyTorch, and how fast.",
    )
    return execute(command)


if __name__ == "__main__":
    cli.run(main)
