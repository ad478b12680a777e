"""Fine-tunes a pipeline on pictures or clips with captions: LoRAs of the network that draws and of
the text encoders, or all of the network or some of its modules, text encoders beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from fluxjax.checkpoint.pipeline_folder import load_params, read_config
from fluxjax.checkpoint.templates import Part, abstract_params
from fluxjax.checkpoint.weights_location import named_parts
from fluxjax.config import ConfigError, PipelineConfig
from fluxjax.families import Task, family_of
from fluxjax.families.family import Apply
from fluxjax.file_hash import hash_files
from fluxjax.models.lora import join_scales
from fluxjax.parallel.apply import apply_on
from fluxjax.parallel.mesh import batch_parts, batch_sharding, make_mesh, replicated
from fluxjax.parallel.rules import param_shardings
from fluxjax.sample.picture_inputs import Inputs
from fluxjax.sample.pipeline import Pipeline
from fluxjax.sample.programs import defaults
from fluxjax.sample.sources import hashes_of
from fluxjax.train.data.cache_file import usable_folder
from fluxjax.train.data.catalogue import Report
from fluxjax.train.data.dataset import DataBatch, Dataset, open_dataset
from fluxjax.train.data.settings import DataSettings
from fluxjax.train.encoders import Encoders, folder_encoders
from fluxjax.train.flow_matching import Learner, finetune_loss
from fluxjax.train.job import Job, Placement, replicate, train
from fluxjax.train.loop import run_folder
from fluxjax.train.lora_start import read_start
from fluxjax.train.optimizers import (
    Rates,
    learning_rates,
    make_optimizer,
    text_encoder_share,
)
from fluxjax.train.progress import Filling
from fluxjax.train.recipe import FinetuneRecipe
from fluxjax.train.shown_pictures import Pictures, encode_shown, read_shown, seen_beside
from fluxjax.train.step import TrainState, Tree, make_step
from fluxjax.train.task import channels_of, conditions_of, learnt
from fluxjax.train.trained_networks import (
    TrainedNetworks,
    initial_state,
    load_networks,
    scans,
)
from fluxjax.train.validation import Prompts, Validation


def prepare(recipe: FinetuneRecipe, encoders: Encoders | None = None) -> Job:
    """Loads model and data onto the mesh; `encoders` are those of the recipe's model.

    Raises ConfigError, OSError and ValueError.
    """
    base, mesh = read_config(recipe.model_folder), make_mesh(recipe.mesh)
    base.require_whole(recipe.model)
    config, task = learnt(recipe, base)
    start = read_start(recipe, base, config)
    _check_batches(recipe, mesh)
    seen = _checked_shown(recipe, config)
    encoders = encoders or folder_encoders(recipe.model_folder)
    recipe, note = with_usable_cache(recipe)
    objective = dataclasses.replace(recipe.objective, kinds=conditions_of(recipe, config))
    recipe = dataclasses.replace(recipe, objective=objective)
    joined = channels_of(config, task)
    with Filling() as report:
        data = _open_data(recipe, recipe.data, encoders, mesh, joined, report)
        data.fill(report)
    prompts = _validation_prompts(recipe, config, data, seen, encoders)
    drawn = encoders.latents_of(_validation_frames(recipe, config))
    shown = encode_shown(
        seen, joined, encoders.encode_each, encoders.mask_channels, drawn, begins=task.begins
    )
    held = _held_out(recipe, data, encoders, mesh, joined)
    # The encoders have done their work: their memory is the transformer's.
    encoders.release()
    nets = load_networks(recipe, base, config, mesh, start)
    optimizer, rates = _optimizer(recipe, nets)
    state = initial_state(
        config,
        nets.trained,
        optimizer,
        mesh,
        ema=recipe.decay > 0,
        by_component=recipe.by_component,
    )
    nothing = data.captions([""])
    if config.force_zeros_for_empty_prompt:
        nothing = jax.tree.map(np.zeros_like, nothing)
    empty = Prompts(nothing, data.ids([""]))
    validation = None
    if recipe.validation.every:
        validation = _validation(recipe, config, nets, mesh, held, prompts, shown, empty)
    return Job(
        config=config,
        mesh=mesh,
        model=nets.model,
        data=data,
        frozen=nets.frozen,
        state=state,
        step=_step(recipe, config, nets, optimizer, mesh, state),
        rates=rates,
        empty=jax.tree.map(lambda x: replicate(x, mesh), empty),
        validation=validation,
        notes=[note] * bool(note) + _notes(recipe, task, config, data),
        base=base_hash(recipe.model_folder, config.denoiser, recipe.lora_start),
    )


def _check_batches(recipe: FinetuneRecipe, mesh: Mesh) -> None:
    """Raises ConfigError for batches that the mesh's devices cannot share out."""
    parts = batch_parts(mesh) * recipe.accumulate
    for batch in (recipe.batch, *recipe.data.batches):
        if batch % parts:
            raise ConfigError(
                f"batch {batch} must be a multiple of {parts}: {batch_parts(mesh)} devices share "
                f"it out, in accumulate {recipe.accumulate} parts"
            )


def _checked_shown(recipe: FinetuneRecipe, config: PipelineConfig) -> Pictures:
    """What validation's prompts are given. What is missing shows before hours of encoding."""
    asked, size = recipe.validation, _validation_size(recipe, config)
    if asked.every and asked.prompts:
        config.require_size(*size)
        frames = _validation_frames(recipe, config)
        config.require_frames(frames)
        _check_given(config, {name for name, files in asked.pictures.items() if files}, frames)
    return read_shown(recipe.validation, size, recipe.data)


def _check_given(config: PipelineConfig, names: set[str], frames: int) -> None:
    """Raises ConfigError for pictures that validation's prompts are given and the model does not
    take, and for clips of so few `frames` that a first one would be all of them."""
    if not names:
        return
    try:
        family_of(config.class_name).find_task(config, names)
    except ConfigError as error:
        raise ConfigError(f"validation: {error}") from None
    if config.tiling is not None and frames == 1:
        raise ConfigError(
            "validation.references are first frames of clips: give validation.frames above 1"
        )


def _validation_prompts(
    recipe: FinetuneRecipe,
    config: PipelineConfig,
    data: Dataset,
    seen: Pictures,
    encoders: Encoders,
) -> Prompts | None:
    """Encoded, beside what is `seen` with them; None where there are none."""
    if not recipe.validation.prompts:
        return None
    told, family = defaults(config).told(negative=False), family_of(config.class_name)
    asked = [family.prompt_of(prompt, told) for prompt in recipe.validation.prompts]
    return Prompts(data.captions(asked, seen_beside(seen, encoders)), data.ids(asked))


def _optimizer(
    recipe: FinetuneRecipe, nets: TrainedNetworks
) -> tuple[optax.GradientTransformation, Rates]:
    """With its learning rates, of which text encoders may have a share."""
    default = 1e-4 if recipe.method == "lora" else 1e-5
    rates = learning_rates(recipe.optimizer, recipe.steps, default)
    share = text_encoder_share(recipe.optimizer, default) if nets.encoders else 1.0
    return make_optimizer(recipe.optimizer, rates, dict.fromkeys(nets.encoders, share)), rates


def _step(
    recipe: FinetuneRecipe,
    config: PipelineConfig,
    nets: TrainedNetworks,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state: TrainState,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """One jitted update, whose state lies where `state` does."""
    loss = finetune_loss(
        family_of(config.class_name),
        nets.model,
        recipe.objective,
        _apply(recipe, mesh),
        nets.encoders,
        Learner.of(config, nets.controlnet),
    )
    return make_step(
        loss,
        optimizer,
        seed=recipe.seed,
        ema_decay=recipe.decay,
        precision=recipe.precision,
        accumulate=recipe.accumulate,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh)),
    )


def base_hash(model: Path, denoiser: str = "transformer", lora_start: str = "") -> str:
    """Of the weights that training starts from, and of how they are to be run."""
    names = (*named_parts(model, [denoiser]), "scheduler", "model_index.json")
    more = hashes_of(lora_start, "lora 1").values() if lora_start else ()
    return hash_files(model, names, *more)[:16]


def with_usable_cache(recipe: FinetuneRecipe) -> tuple[FinetuneRecipe, str]:
    """The recipe with a cache that can be written, and what there is to say of it."""
    if recipe.data.cache:
        return recipe, ""
    cache, note = usable_folder(recipe.folder / "cache")
    data = dataclasses.replace(recipe.data, cache=str(cache))
    return dataclasses.replace(recipe, data=data), note


def _notes(recipe: FinetuneRecipe, task: Task, config: PipelineConfig, data: Dataset) -> list[str]:
    notes = [f"warning: {note}" for note in data.notes]
    notes += [f"left out {name}: {reason}" for name, reason in data.quarantined]
    guidance = recipe.objective.guidance
    # Models of pictures joined to the channels are sampled with what they were trained with.
    embeds = getattr(config.networks[config.denoiser], "guidance_embeds", False)
    if embeds and guidance != 1.0 and not task.channels:
        notes.append(
            f"warning: guidance {guidance:g} is fed to the model while it learns from pictures "
            "made without guidance; with 1 it keeps what guidance means when sampling"
        )
    return notes


def _open_data(
    recipe: FinetuneRecipe,
    settings: DataSettings,
    encoders: Encoders,
    mesh: Mesh,
    channels: tuple[str, ...],
    report: Report | None = None,
) -> Dataset:
    index, count = share_of_process(mesh, recipe.batch)
    return open_dataset(
        settings,
        encoders,
        batch=recipe.batch,
        seed=recipe.seed,
        process_index=index,
        process_count=count,
        report=report,
        channels=channels,
        with_ids=recipe.hears_anew,
        kinds=recipe.objective.kinds,
    )


def share_of_process(mesh: Mesh, batch: int) -> tuple[int, int]:
    """(which, of how many) contiguous shares of a global batch this process's devices read."""
    shares = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    spans = [index[0].indices(batch)[:2] for index in shares if index is not None]
    first, last = min(s for s, _ in spans), max(e for _, e in spans)
    return first // (last - first), batch // (last - first)


def _apply(recipe: FinetuneRecipe, mesh: Mesh) -> Apply:
    return partial(apply_on, mesh if mesh.size > 1 else None, sequence=recipe.sequence)


def _shapes(tree: Tree) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _held_out(
    recipe: FinetuneRecipe,
    data: Dataset,
    encoders: Encoders,
    mesh: Mesh,
    channels: tuple[str, ...],
) -> list[DataBatch]:
    """The batches whose loss validation measures."""
    settings = recipe.validation
    if settings.source:
        other = dataclasses.replace(recipe.data, source=settings.source)
        data = _open_data(recipe, other, encoders, mesh, channels)
    return [data(step) for step in range(settings.batches if settings.every else 0)]


def _validation_size(recipe: FinetuneRecipe, config: PipelineConfig) -> tuple[int, int]:
    """(width, height) in pixels."""
    settings = recipe.validation
    return settings.width or config.width, settings.height or config.height


def _validation_frames(recipe: FinetuneRecipe, config: PipelineConfig) -> int:
    return recipe.validation.frames or defaults(config).frames


def _validation(
    recipe: FinetuneRecipe,
    config: PipelineConfig,
    nets: TrainedNetworks,
    mesh: Mesh,
    held: list[DataBatch],
    prompts: Prompts | None,
    shown: Inputs,
    empty: Prompts,
) -> Validation:
    devices, model, lora = mesh if mesh.size > 1 else None, nets.model, None
    quantised: dict[str, Tree] = {}
    if recipe.method == "lora":
        frozen = {name: tree[config.denoiser] for name, tree in nets.frozen.items()}
        lora = _shapes(join_scales(nets.trained[config.denoiser], frozen["scales"]))
        quantised[config.denoiser] = _shapes(frozen["params"])

    def load(component: Any, part: Part = "all") -> Tree:
        assert part == "all", "nothing comes and goes here"
        network = getattr(config, component)
        return load_params(
            recipe.model_folder,
            component,
            network,
            stacked=False,
            dtype=model.dtype,
            shardings=param_shardings(network, abstract_params(network), mesh),
        )

    def no_tokenizers() -> NoReturn:
        raise AssertionError("validation's prompts are encoded with the data")

    pipeline = Pipeline(
        family_of(config.class_name),
        config,
        load,
        no_tokenizers,
        dtype=model.dtype,
        scan_layers=scans(config),
        lora=lora,
        quantised=quantised,
        mesh=devices,
        sequence=recipe.sequence,
    )
    return Validation(
        pipeline,
        nets,
        recipe.validation,
        recipe.objective,
        mesh,
        batches=list(map(Placement(mesh, config), held)),
        prompts=prompts,
        shown=shown,
        empty=empty,
        seed=recipe.seed,
        apply=_apply(recipe, mesh),
    )


def finetune(recipe: FinetuneRecipe) -> Path:
    """Runs a recipe to its end, from where it was stopped; returns the LoRA file or the folder."""
    with run_folder(recipe.folder):
        return train(recipe, prepare(recipe))
