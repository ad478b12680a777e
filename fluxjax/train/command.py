"""What `python -m fluxjax.train` does: a recipe, changed by options, run or printed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from fluxjax import cli
from fluxjax.command_options import parse_options
from fluxjax.config import ConfigError
from fluxjax.terminal import print_line, say

R = TypeVar("R")
_DAY = 86400.0
_LORA_END = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Options(Generic[R]):
    """Train by a recipe. Options that are not given are the recipe's, or the defaults."""

    recipe: Annotated[R, tyro.conf.arg(name="")]
    print_config: bool = False
    """Print the recipe with all defaults and options as TOML, and stop."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for several processes started by hand."""
    process_id: int | None = None
    """This process's number, from 0."""
    num_processes: int | None = None
    """How many processes there are."""
    silence: float = 10.0
    """Of several processes: one that gave no sign of life for so many seconds counts as lost, which
    ends the others. A process that is only slow gives one all the same; one that is stopped does
    not."""


_HELP = """Train by a recipe, a TOML file; options that are not given are the recipe's.

fluxjax train RECIPE ... trains, or goes on where it stopped.

fluxjax train precompute RECIPE ... encodes pictures and captions.

fluxjax train export RUN ... writes the result as of a checkpoint.

fluxjax train evaluate ... reads what the embedded model draws.

Recipes to copy are in train/. RECIPE --help shows its values.

Below are a fine-tuning recipe's options and their defaults."""


def read_options(arguments: Sequence[str], name: str = "python -m fluxjax.train") -> Options[Any]:
    """The recipe named first, changed by the options behind it; `name` is the command's.

    Raises ConfigError for a recipe that is not valid, ValueError for an option.
    """
    from fluxjax.train.recipe import FinetuneRecipe, read_recipe

    if arguments and arguments[0] in ("-h", "--help"):
        recipe, options = FinetuneRecipe(), Options[FinetuneRecipe]
        shown = Options(recipe=recipe)
        parse_options(options, ["-h"], f"{name} RECIPE", default=shown, description=_HELP)
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(
            f"name a recipe first: {name} RECIPE [OPTIONS]; recipes to copy are in train/, and "
            f"{name} RECIPE --help lists the options"
        )
    recipe = read_recipe(Path(arguments[0]))
    return parse_options(
        Options[type(recipe)],
        arguments[1:],
        f"{name} {arguments[0]}",
        default=Options(recipe=recipe),
    )


def train(arguments: Sequence[str], name: str = "python -m fluxjax.train") -> int | None:
    """Run a recipe to its end and print where the result is."""
    options = read_options(arguments, name)
    if options.print_config:
        from fluxjax.train.recipe import recipe_toml

        print(recipe_toml(options.recipe), end="")
        return None
    from fluxjax.parallel.hosts import joined_hosts

    cli.begin("orbax.checkpoint")
    with joined_hosts(
        options.coordinator, options.process_id, options.num_processes, silence=options.silence
    ):
        _train(options.recipe, options.silence)
    return None


def _train(recipe: Any, silence: float) -> None:
    import jax

    from fluxjax.parallel.hosts import agree
    from fluxjax.sample.cache import enable_cache
    from fluxjax.train.recipe import FinetuneRecipe, recipe_values

    note = enable_cache()
    if note and jax.process_index() == 0:
        say(f"note: {note}")
    agree(recipe_values(recipe))
    if jax.process_count() > 1 and jax.process_index() == 0:
        say(
            f"{jax.process_count()} processes: one that gives no sign of life for {silence:g} s "
            "counts as lost, and JAX ends all of them (--silence)"
        )
    if isinstance(recipe, FinetuneRecipe):
        from fluxjax.train.finetune import finetune

        result = finetune(recipe)
    else:
        result = recipe.train()
    if jax.process_index() == 0:
        print_line(str(result))


def precompute(arguments: Sequence[str], name: str = "python -m fluxjax.train precompute") -> None:
    """Encode all pictures and captions of a recipe's data, and print what they are.

    Several processes share the work; on disks of their own each does all of it.
    """
    options = read_options(arguments, name)
    recipe = options.recipe
    from fluxjax.train.recipe import FinetuneRecipe

    if not isinstance(recipe, FinetuneRecipe):
        raise ConfigError("the embedded model's recipe draws its own data: nothing to precompute")
    from fluxjax.checkpoint.pipeline_folder import read_config
    from fluxjax.parallel.hosts import barrier, joined_hosts
    from fluxjax.train.data import dataset
    from fluxjax.train.finetune import with_usable_cache
    from fluxjax.train.progress import Filling
    from fluxjax.train.task import channels_of, conditions_of, learnt

    cli.begin()
    with joined_hosts(
        options.coordinator, options.process_id, options.num_processes, silence=options.silence
    ):
        import jax

        config, task = learnt(recipe, read_config(recipe.model_folder))
        recipe, note = with_usable_cache(recipe)
        if note and jax.process_index() == 0:
            say(f"note: {note}")
        with Filling() as report:
            done = dataset.precompute(
                recipe.data,
                recipe.model_folder,
                report=report,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                channels=channels_of(config, task),
                kinds=conditions_of(recipe, config),
            )
        barrier("precomputed", _DAY)  # a process that ends early would be taken for lost
        if jax.process_index() == 0:
            for line in done.splitlines():
                print_line(line)


def _given(metavar: str) -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write the LoRA file, or the pipeline, of a fine-tuning run as of a checkpoint."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder, in which training may still go on."""
    step: Annotated[int | None, _given("INT")] = None
    """The checkpoint's; by default the newest."""
    model: Annotated[str | None, _given("FOLDER_OR_HUB_NAME")] = None
    """Where the run's model is now, if it has moved."""
    out: Annotated[Path | None, _given("NEW_FILE_OR_FOLDER")] = None
    """What to write; by default lora_STEP.safetensors or pipeline_STEP in the run's folder."""
    link: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Of the other embedded models: what they share with the embedded FLUX model as symbolic links
    to that, as they are shipped."""


def export(arguments: Sequence[str], name: str = "python -m fluxjax.train export") -> None:
    """Write the result of a run as of one of its checkpoints, and print where it is."""
    options = parse_options(ExportOptions, arguments, name)
    from fluxjax.train.recipe import read_recipe

    # What is no run is told before JAX is imported.
    recipe = read_recipe(options.run / "recipe.toml")
    out, lora = options.out, recipe.task == "finetune" and recipe.method == "lora"
    if out is not None and os.path.lexists(out):
        raise FileExistsError(f"{out} exists, and is not overwritten: give a new name")
    if out is not None and lora and out.suffix != _LORA_END:
        raise ConfigError(f"{out}: the name of a LoRA's file ends in {_LORA_END}")
    from fluxjax.train.export import export_run

    cli.begin("orbax.checkpoint")
    linked = {"link": True} if options.link else {}
    links = recipe.task in ("embedded-sd", "embedded-pixart", "embedded-video")
    if linked and not links:
        raise ConfigError("--link is for runs of the embedded models that share files with another")
    if links:
        recipe = replace(recipe, folder=options.run)
        done = recipe.export(options.out or options.run / "pipeline", **linked)
    else:
        done = export_run(options.run, step=options.step, model=options.model, out=options.out)
    print_line(str(done))
