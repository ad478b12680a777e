"""A prepared fine-tuning job, and its run from where it was stopped to its result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from fluxjax.atomic_write import write_bytes
from fluxjax.cli import sentence
from fluxjax.config import PipelineConfig
from fluxjax.families import family_of
from fluxjax.networks import network_of
from fluxjax.parallel.mesh import batch_sharding, replicated
from fluxjax.train.curve import draw_curve
from fluxjax.train.data.dataset import DataBatch, Dataset
from fluxjax.train.export import export
from fluxjax.train.flow_matching import Rows, assemble
from fluxjax.train.loop import METRICS, Hooks, Run, RunSettings
from fluxjax.train.metrics import Row
from fluxjax.train.optimizers import Rates
from fluxjax.train.progress import Progress
from fluxjax.train.recipe import FinetuneRecipe, deciding_values, recipe_toml
from fluxjax.train.step import TrainState, Tree
from fluxjax.train.validation import Prompts, Validation


class Job(NamedTuple):
    """Everything a run needs. `frozen` is never trained; `state` holds what is, and `step` is one
    update of it, compiled when it is first called."""

    config: PipelineConfig
    mesh: Mesh
    model: nn.Module
    data: Dataset
    frozen: dict[str, Tree]
    state: TrainState
    step: Callable[..., tuple[TrainState, dict[str, Array]]]
    rates: Rates
    empty: Prompts
    validation: Validation | None
    notes: list[str]
    base: str  # hash of the weights that training starts from


class Placement:
    """Brings batches of this process's rows onto the devices of all.

    What depends on a picture's size alone is placed once: made anew it would wait for the step
    before to end.
    """

    def __init__(self, mesh: Mesh, config: PipelineConfig) -> None:
        self.mesh, self.config = mesh, config
        self.family = family_of(config.class_name)
        self._of_size: dict[tuple[int, int, int], tuple[Array | None, Array]] = {}

    def __call__(self, batch: DataBatch) -> tuple[Rows, Array | None, Array]:
        """(global rows on the devices, positions of tokens if they have any, mu)."""
        where, size = batch_sharding(self.mesh), (batch.width, batch.height, batch.frames)
        leaves = Rows(*(getattr(batch, name) for name in Rows._fields))
        rows = jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(where, np.asarray(leaf)), leaves
        )
        if size not in self._of_size:
            shape = self.family.shape_of(self.config, *size)
            ids = self.family.pack(np.zeros((1, *shape), np.float32)).positions
            mu = np.float32(self.family.shift(self.config, *shape[1:]))
            placed = None if ids is None else replicate(ids, self.mesh)
            self._of_size[size] = placed, replicate(mu, self.mesh)
        return rows, *self._of_size[size]


def replicate(x: Any, mesh: Mesh) -> Array:
    """An array that all processes have alike, on every device of the mesh."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, replicated(mesh), lambda index: x[index])


def train(recipe: FinetuneRecipe, job: Job) -> Path:
    """The job, to its end; hold `loop.run_folder`. Returns the LoRA file or the folder."""
    board = recipe.folder / "tensorboard" if recipe.tensorboard else None
    with Progress(recipe.steps, tensorboard=board) as progress:
        for note in job.notes:
            progress.say(note)
        job.data.train(progress.say)
        training = _Training(recipe, job, progress)
        try:
            state = training.run().to_end(job.state)
        finally:
            training.close()
        where = export(recipe, job.config, weights(state), job.frozen)
        if jax.process_index() == 0:
            _draw_curve(recipe.folder, progress.say)
        progress.say(f"finished: {where}")
    return where


class _Training:
    """What a run does at each step, and what it reports, measures and leaves on the way."""

    def __init__(self, recipe: FinetuneRecipe, job: Job, progress: Progress) -> None:
        self.recipe, self.job, self.progress = recipe, job, progress
        self._frozen = {
            name: job.frozen[name]
            for name in ("params", "scales", "rest", "base")
            if name in job.frozen
        }
        self._place = Placement(job.mesh, job.config)
        self._batches: Iterator[DataBatch] | None = None

    def run(self) -> Run:
        recipe, lora = self.recipe, self.recipe.method == "lora"
        settings = RunSettings(
            steps=recipe.steps,
            folder=recipe.folder,
            log_every=recipe.log_every,
            probe_every=recipe.validation.every or recipe.steps,
            save_seconds=60 * recipe.save_minutes,
            export_every=recipe.export_every,
            keep=recipe.keep,
            patience=recipe.patience,
            hang_seconds=60 * recipe.hang_minutes,
        )
        hooks = Hooks(
            started=self.write_recipe,
            probe=self.probe,
            report=self.report,
            export=self.export,
            # Who sends SIGTERM may not wait until a whole pipeline is written.
            **({"stopped": self.export} if lora else {}),
            say=self.progress.say,
        )
        identity = {"data": self.job.data.identity, "base weights": self.job.base}
        return Run(settings, self.advance, hooks, {**deciding_values(recipe), **identity})

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()  # pyright: ignore[reportAttributeAccessIssue]

    def advance(self, state: TrainState, index: int) -> tuple[TrainState, dict[str, Array]]:
        job, start = self.job, time.perf_counter()
        if self._batches is None:
            self._batches = job.data.iterate(index)
        batch = next(self._batches)
        # Otherwise the devices still had the step before to do.
        if state.step.is_ready():  # pyright: ignore[reportAttributeAccessIssue]
            self.progress.waited += time.perf_counter() - start
        rows, ids, mu = self._place(batch)
        self.progress.images += len(rows.index)
        self.progress.flops += _flops(self.recipe, job.config, rows)
        empty, empty_ids = job.empty
        return job.step(state, rows, self._frozen, empty, ids, mu, empty_ids)

    def write_recipe(self) -> None:
        if jax.process_index() == 0:
            write_bytes(self.recipe.folder / "recipe.toml", recipe_toml(self.recipe).encode())

    def report(self, row: Row) -> None:
        row["learning_rate"] = float(self.job.rates(row["step"] - 1))
        self.progress(row)

    def probe(self, state: TrainState) -> dict[str, float]:
        """Draws the grid of pictures and measures the loss, as far as they are asked for."""
        start, validation = time.perf_counter(), self.job.validation
        if validation is None:
            return {}
        job = self.job
        params = assemble(job.config.denoiser, job.model, weights(state), job.frozen)
        found = {}
        if validation.batches:
            found["validation_loss"] = validation.loss(params)
        if self.recipe.validation.prompts:
            path = self.recipe.folder / f"validation/{int(state.step):07d}.png"
            try:
                validation.save(params, path)
            except OSError as error:
                self.progress.say(f"warning: {sentence(error)}; training goes on")
        self.progress.paused += time.perf_counter() - start
        return found

    def export(self, state: TrainState) -> None:
        start, job = time.perf_counter(), self.job
        step = int(state.step)
        where = export(self.recipe, job.config, weights(state), job.frozen, step=step)
        self.progress.say(f"wrote {where}")
        self.progress.paused += time.perf_counter() - start


def weights(state: TrainState) -> Tree:
    """What a run is judged by and leaves behind: the average where one is kept."""
    return state.params if state.ema is None else state.ema


def _flops(recipe: FinetuneRecipe, config: PipelineConfig, rows: Rows) -> float:
    """Of one step without what is computed twice; what is frozen needs no gradient of its own."""
    passes = 3 if recipe.method == "full" else 2
    pictures = (rows.latents, rows.reference)
    image = sum(math.prod(x.shape[1:-1]) for x in pictures if x is not None)
    if config.tiling is not None:  # a clip's latents come unpacked
        image //= (config.unit // config.vae.scale) ** 2
    text = rows.conditioning.sequence.shape[1]
    each = [(config.networks[config.denoiser], passes), *((net, 3) for net in config.controlnets)]
    known = [(network_of(network).flops, network, count) for network, count in each]
    done = (count * flops(network, image, text) for flops, network, count in known if flops)
    return len(rows.index) * sum(done, 0.0)


def _draw_curve(folder: Path, say: Callable[[str], None]) -> None:
    """The result is there: what a curve lacks is only said."""
    try:
        draw_curve(folder / METRICS, folder / "curve.png")
    except (OSError, ValueError) as error:
        say(f"warning: there is no curve.png: {sentence(error)}")
