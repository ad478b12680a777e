"""`fluxjax completion SHELL`: the script with which a shell completes verbs and options."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fluxjax.convert.options import Options as Convert
from fluxjax.diff.commands import Command as Diff
from fluxjax.plan.options import Options as Plan
from fluxjax.sample.options import Options as Sample
from fluxjax.train.command import ExportOptions
from fluxjax.train.command import Options as Training
from fluxjax.train.embedded.evaluate_settings import EvaluateSettings
from fluxjax.train.recipe import FinetuneRecipe

SHELLS = ("bash", "zsh", "tcsh")
_verb = tyro.conf.subcommand


@dataclass(frozen=True, kw_only=True)
class _Recipe(Training[FinetuneRecipe]):
    """Train by a recipe."""

    file: Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class _Train(_Recipe):
    """Train by a recipe, or what else has to do with one."""

    verb: (
        Annotated[_Recipe, _verb("precompute")]
        | Annotated[ExportOptions, _verb("export")]
        | Annotated[EvaluateSettings, _verb("evaluate")]
    )


@dataclass(frozen=True)
class _Diff:
    """Compare with PyTorch."""

    command: Diff


_Command = tyro.conf.OmitSubcommandPrefixes[
    Annotated[Sample, _verb("sample")]
    | Annotated[_Train, _verb("train")]
    | Annotated[Convert, _verb("convert")]
    | Annotated[_Diff, _verb("diff")]
    | Annotated[Plan, _verb("plan")]
]


def print_completion(arguments: Sequence[str]) -> None:
    """Print the script. Raises ValueError for a shell that has none."""
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise ValueError(
            f"name a shell, {', '.join(SHELLS)}; for bash: source <(fluxjax completion bash)"
        )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(_Command, prog="fluxjax", args=["--tyro-print-completion", arguments[0]])
    # A description of several lines would be taken for more words.
    lines = (
        line.replace("\\n", " ") if line.startswith("COMPLETION_SPEC") else line
        for line in printed.getvalue().splitlines(keepends=True)
    )
    # Where no option fits, bash offers files: recipes, models, pictures.
    print("".join(lines).replace("complete -F ", "complete -o default -F "), end="")
