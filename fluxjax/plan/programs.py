"""The programs of a plan, compiled from shapes alone: what is placed, and what each one does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from fluxjax.checkpoint.templates import abstract_params, in_dtype, quantised_template
from fluxjax.config import ConfigError, LoraConfig, PipelineConfig
from fluxjax.config.flux_pipeline import require_flux
from fluxjax.config.video_pipeline import VideoPipelineConfig
from fluxjax.families import Family, Task, family_of
from fluxjax.models.attention import auto_attention
from fluxjax.models.compilation import IN_LOOPS, compiler_options
from fluxjax.parallel.apply import apply_on
from fluxjax.parallel.compiled_program import Structure, measure
from fluxjax.parallel.host_memory import HOST
from fluxjax.parallel.mesh import batch_parts, batch_sharding, make_mesh, replicated
from fluxjax.parallel.rules import bytes_per_device, param_shardings, state_shardings
from fluxjax.plan.attention import flash_like
from fluxjax.plan.clips import (
    FLOAT_CONVOLUTIONS,
    PUBLISHED,
    tiles,
)
from fluxjax.plan.options import Options, device_count, mesh_shape, read_beside
from fluxjax.plan.tools import Tools
from fluxjax.quantised_kinds import LOADED
from fluxjax.sample import ip_adapter, redux
from fluxjax.sample.denoise import passes_run
from fluxjax.sample.executables import Executables
from fluxjax.sample.picture_reader import Reading, read_pictures
from fluxjax.sample.programs import NAMES, Name, components, defaults, programs
from fluxjax.sample.quantise_option import parse_quantise
from fluxjax.sample.settings import Settings
from fluxjax.train.flow_matching import Learner, Rows, finetune_loss
from fluxjax.train.optimizers import learning_rates, make_optimizer
from fluxjax.train.settings import Objective, OptimizerSettings
from fluxjax.train.step import init_state, make_step
from fluxjax.train.task import channels_of
from fluxjax.train.trained_networks import initial_loras

Say = Callable[[str], None]


@dataclass(frozen=True)
class Program:
    """One compiled program; `reads` are the bytes of weights and state that it must read or write
    on each device, however well everything else is fused; `held` those of weights that are there
    while it runs."""

    name: str
    structure: Structure
    reads: int
    held: int


@dataclass(frozen=True)
class Placed:
    """Bytes on the fullest device, by what they are, and the programs that run."""

    weights: dict[str, int]
    optimizer: int
    programs: tuple[Program, ...]
    notes: tuple[str, ...] = ()


def compile_plan(options: Options, config: PipelineConfig, say: Say) -> Placed:
    """Compiles for this process's devices; raises ConfigError for what cannot be placed."""
    count = device_count(options)
    if jax.device_count() < count:
        raise ConfigError(f"the plan needs {count} simulated devices, got {jax.device_count()}")
    mesh = make_mesh(mesh_shape(options), jax.devices()[:count])
    parts = batch_parts(mesh) * (1 if options.task == "sample" else options.accumulate)
    if options.batch % parts:
        raise ConfigError(
            f"batch {options.batch} must be a multiple of {parts}, which share it out"
        )
    if options.task == "sample":
        return _sampling(options, config, mesh, say)
    if config.tiling is None:
        config = require_flux(config, options.model)
    return _training(options, config, mesh, say)


def _spec(mesh: Mesh, shape: tuple[int, ...], dtype: Any, rows: bool = True) -> Any:
    where = batch_sharding(mesh) if rows else replicated(mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _placed(tree: Any, shardings: Any, dtype: Any = None) -> Any:
    def place(leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=where)

    return jax.tree.map(place, tree, shardings)


def _on_device(trees: Any) -> int:
    """Bytes of shapes that do not lie on the host."""
    leaves = jax.tree.leaves(list(trees))
    return sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in leaves
        if leaf.sharding is None or leaf.sharding.memory_kind != HOST
    )


def _size(tree: Any) -> int:
    return bytes_per_device(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))


def _sampling(options: Options, config: PipelineConfig, mesh: Mesh, say: Say) -> Placed:
    dtype, tools = jnp.dtype(options.dtype), read_beside(options, config)
    config = dataclasses.replace(config, controlnets=tools.controlnets)
    readings = _readings(tools)
    templates = _templates(options, config, mesh)
    weights = {name: _size(template) for name, template in templates.items()}
    for name, size in _beside_bytes(config, readings, mesh, dtype).items():
        weights[name] = size
    family = family_of(config.class_name)
    devices = mesh if mesh.size > 1 else None
    executables = Executables(
        family,
        config,
        dtype,
        True,
        mesh=devices,
        sequence=options.sequence,
        quantised=templates,
        stream=options.stream,
    )
    n, size, task = options.batch, (config.width, config.height), _task(options, config)
    needed = dataclasses.replace(defaults(config), strength=task.strength)
    listed = programs(
        family,
        config,
        needed,
        dtype=dtype,
        task=task,
        pictures=n,
        prompts=n,
        reference_size=size,
        more_text=0 if tools.redux is None else tools.redux[0].tokens,
        image_prompts=_keys_of(tools),
        rows=executables.rows,
        padded=False,
    )
    reads: dict[Name, int] = {
        name: sum(weights.get(part, 0) for part in components(config, name)) for name in NAMES
    }
    evaluations = _evaluations(family, config, needed)
    every = len(listed[0].inputs[1].schedule.times)
    reads["denoise"] *= evaluations
    share, notes = _shares(family, config, needed, task, every)
    if config.tiling is None and "decode" not in {program.name for program in listed}:
        notes = (*notes, "a picture of this size is decoded in tiles, which is not counted")
    if options.offload:
        (denoise,) = (program for program in listed if program.name == "denoise")
        listed = [*executables.split(denoise), *listed[1:]]
    done = _read(readings, weights, dtype, options, say)
    for program in sorted(listed, key=lambda program: list(reads).index(program.name)):
        say(program.name)
        with auto_attention(flash_like):  # as accelerators have it
            compiled = executables.compile(program, IN_LOOPS)
        held, read = sum(weights.values()), reads[program.name]
        steps = program.name == "denoise"
        if options.offload:
            held = _on_device(executables.arguments(program))
            if program.part != "all":
                read = held * (evaluations if program.part == "steps" else 1)
        elif options.stream:
            held = _on_device(executables.shapes(name) for name in weights)
        found = measure(compiled)
        done.append(Program(program.name, found.part(share) if steps else found, read, held))
    if config.tiling is not None:
        say("decode")
        clips = cast(VideoPipelineConfig, config)
        decode, more = _decode_clips(options, clips, weights, mesh, templates["vae"])
        done, notes = [*done, decode], (*notes, *more)
    return Placed(weights, 0, tuple(done), notes)


def _shares(
    family: Family, config: PipelineConfig, needed: Settings, task: Task, every: int
) -> tuple[float, tuple[str, ...]]:
    """How much of all passes of `every` step is run, and notes that say why."""
    share, notes = _passes(family, config, needed, task), tuple[str, ...]()
    if share < 1:
        notes = (f"steps that are not guided have one pass: {share:.0%} of all passes are run",)
    evaluations = _evaluations(family, config, needed)
    if evaluations < every:
        drawn = f"{evaluations} of {every} steps, by a strength of {task.strength:g}"
        share, notes = share * evaluations / every, (*notes, f"an image is drawn anew in {drawn}")
    return share, notes


def _templates(options: Options, config: PipelineConfig, mesh: Mesh) -> dict[str, Any]:
    """Shapes of the parameters of each network, with their places."""
    dtype, found = jnp.dtype(options.dtype), {}
    for name, network in config.networks.items():
        template = _template(options, name, network, dtype)
        found[name] = _placed(template, param_shardings(network, template, mesh))
    return found


def _passes(family: Family, config: PipelineConfig, settings: Settings, task: Task) -> float:
    """The part of a run's passes that is run, where weights of frames let steps rest."""
    asked = settings.asked_guidance._replace(pictures=task.pictures)
    weights = family.passes(config.steps, family.scale(config, asked))
    if weights.ndim < 3:
        return 1.0
    return passes_run(weights) / (weights.shape[0] * (weights.shape[1] + 1))


def _evaluations(family: Family, config: PipelineConfig, settings: Settings) -> int:
    """How often a run of `settings` runs the network."""
    shape = family.shape_of(config, settings.width, settings.height, settings.frames)
    return family.run(config, settings.course(family.first_step), *shape[1:]).evaluations


def _decode_clips(
    options: Options, config: VideoPipelineConfig, weights: dict[str, int], mesh: Mesh, vae: Any
) -> tuple[Program, tuple[str, ...]]:
    """The autoencoder's tiles, and remarks; `vae`: shapes of its parameters."""
    sides = config.height // config.vae.scale, config.width // config.vae.scale
    latents = (config.latent_frames(config.frames), *sides)
    structure, many = tiles(config, latents, vae, mesh.size, options.batch)
    held = weights["vae"] if options.offload else sum(weights.values())
    notes = (
        *map(str, PUBLISHED.get(options.model, ())),
        *([FLOAT_CONVOLUTIONS] if options.dtype != "float32" else []),
    )
    return Program("decode", structure, many * weights["vae"], held), notes


def _readings(tools: Tools) -> dict[str, Reading]:
    """What reads pictures, by the tool."""
    found = {}
    if tools.redux is not None:
        encoder, projector = tools.redux
        found["redux"] = Reading(encoder, (projector,), redux.SEEN)
    if tools.ip_adapters is not None:
        encoder, adapters = tools.ip_adapters
        found["ip_adapter"] = Reading(encoder, adapters, ip_adapter.SEEN)
    return found


def _keys_of(tools: Tools) -> list[tuple[int, int, int]]:
    """(layers, tokens, width) of what each IP-Adapter adds."""
    adapters = tools.ip_adapters[1] if tools.ip_adapters else ()
    return [(one.num_layers, one.num_tokens, one.inner_dim) for one in adapters]


def _beside_bytes(
    config: PipelineConfig, readings: dict[str, Reading], mesh: Mesh, dtype: Any
) -> dict[str, int]:
    """Bytes of the weights of tools on a device: ControlNets shared out, what reads pictures whole
    on the first."""
    found: dict[str, int] = {}
    for net in dict.fromkeys(config.controlnets):  # one that is named twice is there once
        shapes = in_dtype(abstract_params(net, stacked=True), dtype)
        size = _size(_placed(shapes, param_shardings(net, shapes, mesh)))
        found["controlnets"] = found.get("controlnets", 0) + size
    for name, reading in readings.items():
        found[name] = _on_device(reading.weights(dtype))
    return found


def _read(
    readings: dict[str, Reading], weights: dict[str, int], dtype: Any, options: Options, say: Say
) -> list[Program]:
    """The programs that read one picture each."""
    done = []
    chosen: dict[str, str | bool] = {**compiler_options(), **IN_LOOPS}
    for name, reading in readings.items():
        say(name)
        size = reading.encoder.image_size
        pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        with auto_attention(flash_like):
            lowered = read_pictures.lower(reading, dtype, reading.weights(dtype), pixels)
            compiled = lowered.compile(compiler_options=chosen)
        held = weights[name] if options.offload else sum(weights.values())
        done.append(Program(name, measure(compiled), weights[name], held))
    return done


def _template(options: Options, name: str, network: Any, dtype: Any) -> dict[str, Any]:
    """Shapes of a network's parameters as they lie on devices."""
    tree, kind = abstract_params(network, stacked=True), parse_quantise(options.quantise).get(name)
    if kind in LOADED:
        tree = quantised_template(tree, network, kind)
    return in_dtype(tree, dtype)


def _task(options: Options, config: PipelineConfig) -> Task:
    """The one of the pictures that are named, or the simplest of the model's."""
    family, pictures = family_of(config.class_name), options.pictures
    if not pictures and options.model == "kontext" and not config.controlnets:
        pictures = ("reference",)
    first = family.tasks_of(config)[0]
    return family.find_task(config, pictures or first.pictures, noise_mask=config.noise_mask)


def _training(options: Options, config: PipelineConfig, mesh: Mesh, say: Say) -> Placed:
    lora, dtype = options.task == "lora", jnp.dtype(options.dtype)
    family, network = family_of(config.class_name), config.networks[config.denoiser]
    model, _ = family.networks(
        config,
        "diffusers",
        dtype=dtype,
        param_dtype=dtype if lora else jnp.float32,
        scan_layers=True,
        remat=options.remat,
    )
    base = abstract_params(network, stacked=True)
    shardings = param_shardings(network, base, mesh)
    frozen: dict[str, Any] = {}
    trained = _placed(base, shardings)
    if lora:
        adapter = LoraConfig(rank=options.rank)
        made = jax.eval_shape(lambda: initial_loras(adapter, config, 0, stacked=True, added={}))
        trained, scales = _placed(made, state_shardings(network, made, mesh))
        held = _template(options, "transformer", network, dtype)
        placed = _placed(held, param_shardings(network, held, mesh))
        frozen = {"params": {"transformer": placed}, "scales": scales}
    settings = OptimizerSettings(name=options.optimizer)
    optimizer = make_optimizer(settings, learning_rates(settings, 1000, 1e-4))
    state = jax.eval_shape(lambda p: init_state(p, optimizer, ema=options.ema), trained)
    where = state_shardings(network, state, mesh)
    state = _placed(state, where)
    apply = partial(apply_on, mesh if mesh.size > 1 else None, sequence=options.sequence)
    step = make_step(
        finetune_loss(family, model, Objective(), apply, of=Learner.of(config)),
        optimizer,
        seed=0,
        ema_decay=0.999,
        accumulate=options.accumulate,
        out_shardings=(where, replicated(mesh)),
        donate=True,
    )
    weights = {"transformer": _size(frozen.get("params", state.params))}
    if lora:
        weights["LoRA"] = _size(state.params)
    held = _size(state.opt_state) + (_size(state.ema) if options.ema else 0)
    # The state is read and written, the frozen weights are read forwards and backwards.
    moved = 2 * (held + _size(state.params)) + (2 * weights["transformer"] if lora else 0)
    rows, *rest = _examples(options, config, mesh)
    arguments = (state, rows, frozen, *rest)
    say("step")
    with auto_attention(flash_like):
        lowered = step.lower(*arguments)  # pyright: ignore[reportFunctionMemberAccess]
        compiled = lowered.compile(compiler_options=compiler_options() | IN_LOOPS)
    program = Program("step", measure(compiled), moved, sum(weights.values()))
    return Placed(weights, held, (program,))


def _examples(options: Options, config: PipelineConfig, mesh: Mesh) -> tuple[Rows, Any, Any, Any]:
    """(rows, what an empty caption says, ids, mu) of a training step."""
    family, n = family_of(config.class_name), options.batch
    text = config.max_sequence_length
    heard, dropped = (family.text_shapes(config, rows, text, jnp.float32)[1] for rows in (n, 1))
    drawn = defaults(config)
    shape = family.shape_of(config, drawn.width, drawn.height, drawn.frames)
    packed = jax.eval_shape(family.pack, jax.ShapeDtypeStruct((n, *shape), jnp.float32))
    given, task = None, _task(options, config)
    if channels_of(config, task):
        size = (*packed.values.shape[:-1], family.joined(config))
        given = _spec(mesh, size, jnp.float32)
    edits = "reference" in task.pictures and config.tiling is None  # beside the picture
    rows = Rows(
        _spec(mesh, packed.values.shape, jnp.float32),
        _placed(heard, jax.tree.map(lambda _: batch_sharding(mesh), heard)),
        _spec(mesh, (n,), jnp.int32),
        reference=_spec(mesh, packed.values.shape, jnp.float32) if edits else None,
        channels=given,
    )
    empty = _placed(dropped, jax.tree.map(lambda _: replicated(mesh), dropped))
    ids = _spec(mesh, packed.positions.shape, jnp.float32, rows=False)
    mu = _spec(mesh, (), jnp.float32, rows=False)
    return rows, empty, ids, mu
