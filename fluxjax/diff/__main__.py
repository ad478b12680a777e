"""python -m fluxjax.diff golden | live | bench: how far ours is from PyTorch, and how fast."""

from __future__ import annotations

import tyro

from fluxjax.cli import run
from fluxjax.diff.commands import Bench, Golden, Live, execute


def main() -> int:
    return execute(
        tyro.extras.subcommand_cli_from_dict(
            {"golden": Golden, "live": Live, "bench": Bench},
            prog="python -m fluxjax.diff",
            description=__doc__,
        )
    )


if __name__ == "__main__":
    run(main)
