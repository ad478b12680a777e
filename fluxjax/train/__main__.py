"""python -m fluxjax.train RECIPE | evaluate"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from fluxjax import cli


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Train by a recipe: a TOML file with one table per stage."""

    recipe: tyro.conf.Positional[Path]
    folder: Path | None = None
    """Where checkpoints and the finished pipeline go; the recipe's by default."""


def main() -> None:
    if sys.argv[1:2] == ["evaluate"]:
        from fluxjax.train.evaluate import EvaluateSettings, evaluate

        settings = tyro.cli(EvaluateSettings, args=sys.argv[2:], prog="fluxjax.train evaluate")
        evaluate(settings)
        return
    settings = tyro.cli(TrainSettings, prog="python -m fluxjax.train")
    from dataclasses import replace

    from fluxjax.train.tiny import read_recipe, train_tiny

    recipe = read_recipe(settings.recipe)
    if settings.folder is not None:
        recipe = replace(recipe, folder=settings.folder)
    print(train_tiny(recipe))


if __name__ == "__main__":
    cli.run(main)
