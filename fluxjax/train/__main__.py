"""python -m fluxjax.train RECIPE | precompute RECIPE | evaluate"""

from __future__ import annotations

import sys

from fluxjax import cli


def main() -> int | None:
    verb, *rest = sys.argv[1:] or [""]
    if verb == "evaluate":
        import tyro

        from fluxjax.train.embedded.evaluate import EvaluateSettings, evaluate

        evaluate(tyro.cli(EvaluateSettings, args=rest, prog="fluxjax.train evaluate"))
        return None
    from fluxjax.train import command

    if verb == "precompute":
        return command.precompute(rest)
    return command.train([verb, *rest] if verb else [])


if __name__ == "__main__":
    cli.run(main)
