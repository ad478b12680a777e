"""python -m fluxjax.train RECIPE | precompute RECIPE | export RUN | evaluate"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from fluxjax import cli

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(
    arguments: Sequence[str] | None = None, prog: str = "python -m fluxjax.train"
) -> int | None:
    arguments = sys.argv[1:] if arguments is None else arguments
    verb, *rest = arguments or [""]
    if verb == "evaluate":
        from fluxjax.command_options import parse_options
        from fluxjax.train.embedded.evaluate_settings import EvaluateSettings

        settings = parse_options(EvaluateSettings, rest, f"{prog} evaluate")
        from fluxjax.train.embedded.evaluate import evaluate

        cli.begin()
        evaluate(settings)
        return None
    from fluxjax.train import command

    if verb == "export":
        return command.export(rest, f"{prog} export")
    if verb == "precompute":
        return command.precompute(rest, f"{prog} precompute")
    return command.train(arguments, prog)


if __name__ == "__main__":
    cli.run(main)
