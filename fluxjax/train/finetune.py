"""Fine-tunes a FLUX pipeline on pictures with captions: a LoRA, or all of the transformer."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from fluxjax.checkpoint.pipeline_folder import load_params, read_config
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import ConfigError, PipelineConfig
from fluxjax.models.flops import flux_flops
from fluxjax.models.flux import FluxTransformer
from fluxjax.models.latents import image_ids, latent_size, unpack
from fluxjax.models.lora import init_lora, split_scales, variables
from fluxjax.models.stacking import scan_by_default
from fluxjax.parallel.mesh import batch_parts, batch_sharding, make_mesh, replicated
from fluxjax.parallel.networks import shard_transformer
from fluxjax.parallel.rules import param_shardings, state_shardings
from fluxjax.sample.reference import read_reference
from fluxjax.text.conditioning import Conditioning
from fluxjax.train import loop
from fluxjax.train.curve import draw_curve
from fluxjax.train.data.buckets import fit
from fluxjax.train.data.catalogue import Report
from fluxjax.train.data.dataset import DataBatch, Dataset, open_dataset
from fluxjax.train.data.settings import DataSettings
from fluxjax.train.encoders import Encoders, folder_encoders
from fluxjax.train.export import export_lora, export_pipeline
from fluxjax.train.flow_matching import Rows, assemble, finetune_loss
from fluxjax.train.optimizers import Rates, learning_rates, make_optimizer
from fluxjax.train.progress import Filling, Progress
from fluxjax.train.recipe import FinetuneRecipe, recipe_hash, recipe_toml
from fluxjax.train.step import TrainState, Tree, init_state, make_step
from fluxjax.train.validation import Validation


class Job(NamedTuple):
    """Everything a run needs. `frozen` is never trained; `state` holds what is, and `step` is one
    update of it, compiled when it is first called."""

    config: PipelineConfig
    mesh: Mesh
    model: FluxTransformer
    data: Dataset
    frozen: dict[str, Tree]
    state: TrainState
    step: Callable[..., tuple[TrainState, dict[str, Array]]]
    rates: Rates
    empty: Conditioning
    validation: Validation | None
    notes: list[str]


def prepare(recipe: FinetuneRecipe, encoders: Encoders | None = None) -> Job:
    """Loads model and data onto the mesh; `encoders` are those of the recipe's model.

    Raises ConfigError, OSError and ValueError.
    """
    config, mesh = read_config(recipe.model_folder), make_mesh(recipe.mesh)
    config.require_text_to_image(recipe.model)
    parts = batch_parts(mesh) * recipe.accumulate
    if recipe.batch % parts:
        raise ConfigError(
            f"batch {recipe.batch} must be a multiple of {parts}: {batch_parts(mesh)} devices "
            f"share it out, in accumulate {recipe.accumulate} parts"
        )
    encoders = encoders or folder_encoders(recipe.model_folder)
    seen = _references(recipe, config)  # what is missing shows before hours of encoding
    with Filling() as report:
        data = _open_data(recipe, recipe.data, encoders, mesh, report)
        data.fill(report)
    prompts = data.captions([*recipe.validation.prompts]) if recipe.validation.prompts else None
    references = None if seen is None else _encode(seen, encoders, config)
    held = _held_out(recipe, data, encoders, mesh)
    # The encoders have done their work: their memory is the transformer's.
    encoders.release()
    model, frozen, trained = _networks(recipe, config, mesh)
    rates = learning_rates(recipe.optimizer, recipe.steps, 1e-4 if "params" in frozen else 1e-5)
    optimizer = make_optimizer(recipe.optimizer, rates)
    state = _initial_state(trained, optimizer, mesh, ema=recipe.decay > 0)
    step = make_step(
        finetune_loss(model, recipe.objective), optimizer, seed=recipe.seed,
        ema_decay=recipe.decay, accumulate=recipe.accumulate,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh)),
    )  # fmt: skip
    empty = Conditioning(*(_replicate(x, mesh) for x in data.captions([""])))
    validation = None
    if recipe.validation.every:
        states = None if prompts is None else Conditioning(*map(jnp.asarray, prompts))
        validation = _validation(recipe, config, model, mesh, held, states, references)
        frozen["vae"] = validation.vae
    return Job(
        config, mesh, model, data, frozen, state, step, rates, empty, validation,
        _notes(recipe, config, data),
    )  # fmt: skip


def _notes(recipe: FinetuneRecipe, config: PipelineConfig, data: Dataset) -> list[str]:
    notes = [f"left out {name}: {reason}" for name, reason in data.quarantined]
    guidance = recipe.objective.guidance
    if config.transformer.guidance_embeds and guidance != 1.0:
        notes.append(
            f"warning: guidance {guidance:g} is fed to the model while it learns from pictures "
            "made without guidance; with 1 it keeps what guidance means when sampling"
        )
    return notes


def _open_data(
    recipe: FinetuneRecipe, settings: DataSettings, encoders: Encoders, mesh: Mesh,
    report: Report | None = None,
) -> Dataset:  # fmt: skip
    index, count = share_of_process(mesh, recipe.batch)
    return open_dataset(
        settings, encoders, batch=recipe.batch, seed=recipe.seed,
        process_index=index, process_count=count, report=report,
    )  # fmt: skip


def share_of_process(mesh: Mesh, batch: int) -> tuple[int, int]:
    """(which, of how many) contiguous shares of a global batch this process's devices read."""
    shares = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    spans = [index[0].indices(batch)[:2] for index in shares if index is not None]
    first, last = min(s for s, _ in spans), max(e for _, e in spans)
    return first // (last - first), batch // (last - first)


def _networks(
    recipe: FinetuneRecipe, config: PipelineConfig, mesh: Mesh
) -> tuple[FluxTransformer, dict[str, Tree], Tree]:
    """The transformer, its frozen parts and what is trained."""
    lora, dtype = recipe.method == "lora", recipe.compute_dtype
    stacked = scan_by_default(config.transformer)
    stored = dtype if lora else jnp.dtype("float32")
    model = FluxTransformer(
        config.transformer, dtype=dtype, param_dtype=stored, scan_layers=stacked,
        remat=recipe.remat, attention=recipe.attention,
    )  # fmt: skip
    if mesh.size > 1:
        model = shard_transformer(model, mesh, recipe.sequence)
    abstract = abstract_params(config.transformer, stacked=stacked)
    params = load_params(
        recipe.model_folder, "transformer", config.transformer, stacked=stacked, dtype=stored,
        shardings=param_shardings(abstract, mesh),
    )  # fmt: skip
    if not lora:
        return model, {}, params
    key = jax.random.fold_in(jax.random.key(recipe.seed), 2**31 - 2)

    def start() -> tuple[Tree, Tree]:
        return split_scales(init_lora(key, abstract, recipe.lora))

    where = state_shardings(jax.eval_shape(start), mesh)
    trained, scales = jax.jit(start, out_shardings=where)()
    return model, {"params": params, "scales": scales}, trained


def _initial_state(
    trained: Tree, optimizer: optax.GradientTransformation, mesh: Mesh, *, ema: bool
) -> TrainState:
    def start(params: Tree) -> TrainState:
        return init_state(params, optimizer, ema=ema)

    where = state_shardings(jax.eval_shape(start, trained), mesh)
    return jax.jit(start, out_shardings=where, donate_argnums=0)(trained)


def place_rows(batch: DataBatch, mesh: Mesh, config: PipelineConfig) -> tuple[Rows, Array, Array]:
    """A batch of this process's rows as (global rows on the devices, image ids, mu)."""
    where = batch_sharding(mesh)
    leaves = {name: getattr(batch, name) for name in Rows._fields}
    rows = Rows(
        **{
            name: jax.make_array_from_process_local_data(where, np.asarray(leaf))
            for name, leaf in leaves.items()
            if leaf is not None
        }
    )
    return rows, *_of_size(batch.width, batch.height, mesh, config)


@cache
def _of_size(width: int, height: int, mesh: Mesh, config: PipelineConfig) -> tuple[Array, Array]:
    """Image ids and mu, kept: made anew they would wait for the step before to end."""
    ids = image_ids(*latent_size(width, height, config.vae))
    return _replicate(ids, mesh), _replicate(np.float32(config.scheduler.mu(len(ids))), mesh)


def _replicate(x: Any, mesh: Mesh) -> Array:
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, replicated(mesh), lambda index: x[index])


def _held_out(
    recipe: FinetuneRecipe, data: Dataset, encoders: Encoders, mesh: Mesh
) -> list[DataBatch]:
    """The batches whose loss validation measures."""
    settings = recipe.validation
    if settings.source:
        data = _open_data(
            recipe, dataclasses.replace(recipe.data, source=settings.source), encoders, mesh
        )
    return [data(step) for step in range(settings.batches if settings.every else 0)]


def _references(recipe: FinetuneRecipe, config: PipelineConfig) -> np.ndarray | None:
    """The pictures that validation edits, (prompts, height, width, 3)."""
    settings = recipe.validation
    if not (settings.every and settings.references):
        return None
    width, height = settings.width or config.width, settings.height or config.height
    return np.stack([fit(read_reference(path)[0], width, height) for path in settings.references])


def _encode(pictures: np.ndarray, encoders: Encoders, config: PipelineConfig) -> np.ndarray:
    """Latents (n, c, rows, columns), one picture after the other."""
    tokens = [np.asarray(encoders.encode_image(picture[None])) for picture in pictures]
    size = latent_size(pictures.shape[2], pictures.shape[1], config.vae)
    return np.asarray(unpack(jnp.asarray(np.concatenate(tokens)), *size))


def _validation(
    recipe: FinetuneRecipe, config: PipelineConfig, model: FluxTransformer, mesh: Mesh,
    held: list[DataBatch], states: Conditioning | None, references: np.ndarray | None,
) -> Validation:  # fmt: skip
    vae = None
    if states is not None:
        vae = load_params(
            recipe.model_folder, "vae", config.vae, stacked=False, dtype=jnp.bfloat16,
            shardings=param_shardings(abstract_params(config.vae), mesh),
        )  # fmt: skip
    return Validation(
        config, model, recipe.validation, recipe.objective, mesh,
        batches=[place_rows(batch, mesh, config) for batch in held], states=states,
        references=references, vae=vae, seed=recipe.seed,
    )  # fmt: skip


def finetune(recipe: FinetuneRecipe) -> Path:
    """Runs a recipe to its end, from where it was stopped; returns the LoRA file or the folder."""
    return train(recipe, prepare(recipe))


def train(recipe: FinetuneRecipe, job: Job) -> Path:
    """The prepared job, to its end."""
    folder, speaks = recipe.folder, jax.process_index() == 0
    if speaks:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.toml").write_text(recipe_toml(recipe), encoding="utf-8")
    board = folder / "tensorboard" if recipe.tensorboard else None
    with Progress(recipe.steps, recipe.batch, tensorboard=board) as progress:
        for note in job.notes:
            progress.say(note)
        state = _run(recipe, job, progress)
        if recipe.method == "lora":
            where = export_lora(recipe, weights(state), job.frozen["scales"])
        else:
            where = export_pipeline(recipe, job.config, weights(state))
        if speaks:
            draw_curve(folder / "metrics.jsonl", folder / "curve.png")
        progress.say(f"finished: {where}")
    return where


def _flops(recipe: FinetuneRecipe, config: PipelineConfig, rows: Rows) -> float:
    """Of one step without what is computed twice; a LoRA needs no gradient of its base."""
    passes = 2 if recipe.method == "lora" else 3
    pictures = (rows.latents, rows.reference)
    image, text = sum(x.shape[1] for x in pictures if x is not None), rows.text.shape[1]
    return recipe.batch * passes * flux_flops(config.transformer, image, text)


def _run(recipe: FinetuneRecipe, job: Job, progress: Progress) -> TrainState:
    frozen = {name: job.frozen[name] for name in ("params", "scales") if name in job.frozen}
    batches: Iterator[DataBatch] | None = None

    def advance(state: TrainState, index: int):
        nonlocal batches
        start = time.perf_counter()
        batches = job.data.iterate(index) if batches is None else batches
        batch = next(batches)
        # Otherwise the devices still had the step before to do.
        if state.step.is_ready():  # pyright: ignore[reportAttributeAccessIssue]
            progress.waited += time.perf_counter() - start
        rows, ids, mu = place_rows(batch, job.mesh, job.config)
        progress.flops += _flops(recipe, job.config, rows)
        return job.step(state, rows, frozen, job.empty, ids, mu)

    def report(row: dict[str, Any]) -> None:
        row["learning_rate"] = float(job.rates(row["step"] - 1))
        progress(row)

    def probe(state: TrainState) -> dict[str, float]:
        start = time.perf_counter()
        row = _validate(recipe, job, state)
        progress.paused += time.perf_counter() - start
        return row

    try:
        return loop.run(
            job.state, advance, steps=recipe.steps, folder=recipe.folder,
            save_seconds=60 * recipe.save_minutes, keep=recipe.keep, patience=recipe.patience,
            hang_seconds=60 * recipe.hang_minutes, log_every=recipe.log_every, probe=probe,
            probe_every=recipe.validation.every or recipe.steps, report=report,
            identity={"recipe": recipe_hash(recipe), "data": job.data.fingerprint},
        )  # fmt: skip
    finally:
        if batches is not None:
            batches.close()  # pyright: ignore[reportAttributeAccessIssue]


def _validate(recipe: FinetuneRecipe, job: Job, state: TrainState) -> dict[str, float]:
    """Writes the grid of pictures and returns the validation loss, as far as they are asked for."""
    if job.validation is None:
        return {}
    params = assemble(job.model, weights(state), job.frozen)
    if recipe.validation.prompts:
        job.validation.save(params, recipe.folder / f"validation/{int(state.step):07d}.png")
    if not job.validation.batches:
        return {}
    return {"validation_loss": job.validation.loss(variables(params))}


def weights(state: TrainState) -> Tree:
    """What a run is judged by and leaves behind: the average where one is kept."""
    return state.params if state.ema is None else state.ema
