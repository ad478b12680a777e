"""The programs that a picture needs, with the shapes of what they take; the autoencoder's as pure
functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from fluxjax.checkpoint.templates import Part
from fluxjax.config import PipelineConfig
from fluxjax.families.family import Family, Steps, Task
from fluxjax.models.autoencoder import Autoencoder, denormalize_latents, normalize_latents
from fluxjax.sample import denoise as sampler
from fluxjax.sample.denoise_pictures import Drawn, before_steps, denoise_pictures
from fluxjax.sample.settings import Rounding, Settings
from fluxjax.sample.skip_layers import left_out_shapes
from fluxjax.schedules.schedule import pad
from fluxjax.shapes import Params

Name = Literal["encode", "reference", "posterior", "before", "denoise", "decode"]
NAMES: tuple[Name, ...] = get_args(Name)
OF_RUNS: tuple[Name, ...] = ("before", "denoise")
OF_PICTURES: tuple[Name, ...] = ("reference", "posterior", "decode")
UNTILED_LATENTS = 256 * 256
TEXT_ALONE = Task()


def components(config: PipelineConfig, name: Name) -> tuple[str, ...]:
    """What a program runs: networks, and the `controlnets`."""
    if name == "encode":
        return config.text_encoders
    return (config.denoiser, "controlnets") if name in OF_RUNS else ("vae",)


def of_components(
    config: PipelineConfig, name: Name, each: Callable[[str], Any]
) -> tuple[Any, ...]:
    """`each` of what a program runs, as it takes them: one argument for all text encoders."""
    found = tuple(map(each, components(config, name)))
    return (found,) if name == "encode" else found


@partial(jax.jit, static_argnames="model")
def decode_latents(
    model: Autoencoder, params: Params, latents: Float[Array, "n c h w"]
) -> Float[Array, "n height width 3"]:
    """Pictures, nominally in [-1, 1] and not clamped."""
    x = denormalize_latents(rearrange(latents, "n c h w -> n h w c"), model.config)
    picture: Any = model.apply({"params": params}, x.astype(model.dtype), method="decode")
    return picture


@partial(jax.jit, static_argnames="model")
def encode_pictures(
    model: Autoencoder, params: Params, pictures: Float[Array, "n height width 3"]
) -> Float[Array, "n c h w"]:
    """Of pictures in [-1, 1] the posterior mean, normalised as the transformer sees it."""
    posterior: Any = model.apply({"params": params}, pictures, method="encode")
    latents: Any = normalize_latents(posterior.mean, model.config)
    return rearrange(latents, "n h w c -> n c h w")


@partial(jax.jit, static_argnames="model")
def encode_posterior(
    model: Autoencoder, params: Params, pictures: Float[Array, "n height width 3"]
) -> tuple[Float[Array, "n c h w"], Float[Array, "n c h w"]]:
    """Of pictures in [-1, 1] the posterior's mean and standard deviation, not normalised."""
    posterior: Any = model.apply({"params": params}, pictures, method="encode")
    both = posterior.mean, jnp.exp(0.5 * posterior.logvar)
    return jax.tree.map(lambda x: rearrange(x, "n h w c -> n c h w"), both)


class Program(NamedTuple):
    """A program and the shapes of its inputs, which follow the parameters.

    `function`, jitted, takes `static` arguments and the networks before all, see `of_components`.
    """

    name: Name
    function: Any
    inputs: tuple
    static: tuple = ()
    rounding: Rounding = "diffusers"

    @property
    def part(self) -> Part:
        """Which parameters it uses."""
        if self.name == "before":
            return "before"
        return "steps" if self.name == "denoise" and len(self.inputs) > 2 else "all"


def program(family: Family, name: Name, *inputs: Any, rounding: Rounding = "diffusers") -> Program:
    """`name` for inputs of these shapes (arrays or ShapeDtypeStructs)."""
    functions: dict[Name, Any] = {
        "encode": family.encode,
        "reference": encode_pictures,
        "posterior": encode_posterior,
        "before": before_steps,
        "denoise": denoise_pictures,
        "decode": decode_latents,
    }
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    return Program(name, functions[name], shapes, (family,) * (name in OF_RUNS), rounding)


def defaults(config: PipelineConfig) -> Settings:
    """What a model is sampled with when nothing else is asked."""
    return Settings(**{name: getattr(config, name) for name in config.sampling_fields})


def programs(
    family: Family,
    config: PipelineConfig,
    settings: Settings,
    *,
    dtype: Any,
    task: Task = TEXT_ALONE,
    pictures: int = 1,
    prompts: int = 1,
    reference_size: tuple[int, int] | None = None,
    more_text: int = 0,
    image_prompts: Sequence[tuple[int, int, int]] = (),
    rows: Callable[[Name, int], int] = lambda name, count: count,
    padded: bool = True,
    course: Steps | None = None,
) -> list[Program]:
    """All that pictures of `settings` need, the longest to compile first, then in order of need.

    Args:
      dtype: of weights and computation.
      task: which pictures are given.
      pictures, prompts: drawn and encoded together.
      reference_size: (width, height) at which a reference is seen.
      more_text: tokens beside those of the prompt (Redux); a negative prompt has none.
      image_prompts: (layers, tokens, width) of what each IP-Adapter adds.
      rows: the batch that a program runs for so many pictures or prompts.
      padded: whether the steps are filled up to those of their bucket.
      course: the steps, where they are not what `settings` say.
    """
    spec: Any = jax.ShapeDtypeStruct
    state = jnp.float32 if settings.rounding == "none" else dtype
    n, text = rows("denoise", pictures), settings.max_sequence_length
    shape = family.shape_of(config, settings.width, settings.height, settings.frames)
    course = course or settings.course(family.first_step, paints="mask" in task.pictures)
    run = family.run(config, course, *shape[1:])
    table = run.keeping if task.keeps else run.schedule
    schedule = jax.tree.map(lambda x: spec(x.shape, x.dtype), pad(table) if padded else table)
    steps = len(schedule.times)
    asked = settings.asked_guidance._replace(pictures=task.pictures)
    weights = family.passes(len(run.schedule.times), family.scale(config, asked))
    many = weights.shape[1] + 1
    _, longer = family.text_shapes(config, n, text + more_text, dtype)
    _, conditioning = family.text_shapes(config, n, text, dtype)
    seen_at = reference_size if "reference" in task.pictures and config.tiling is None else None
    reference = channels = kept = None
    if seen_at is not None:
        reference = spec((n, *family.shape_of(config, *seen_at)), dtype)
    if task.channels:
        channels = (spec((n, family.joined(config), *shape[1:]), dtype),) * many
    if task.keeps:
        noise = spec((n, *shape), state)
        kept = sampler.Kept(spec((n, 1, *shape[1:]), jnp.float32), noise, noise)
    attended = tuple((spec((n, *one), dtype),) * 2 for one in image_prompts)
    drawn = Drawn(
        schedule,
        spec((steps, *weights.shape[1:]), jnp.float32),
        (longer, *[conditioning] * (many - 1)),
        spec((n,), jnp.float32),
        reference,
        channels,
        kept,
        _controls(config, n, settings, shape, dtype),
        (attended,) * many if image_prompts else (),
        (spec((steps,), jnp.float32),) * len(config.controlnets),
        tuple(spec(one[:1], jnp.float32) for one in image_prompts),
        spec((n, steps, *shape), state) if schedule.matrices is not None else None,
        spec((), jnp.float32) if settings.guidance_rescale else None,
        left_out_shapes(config, settings.asked_skip_layers, steps),
    )
    states = (spec((n, *shape), state),) * schedule.latents
    listed = partial(program, family)
    ids, _ = family.text_shapes(config, rows("encode", prompts), text, dtype)
    found = [
        listed("denoise", states, drawn, rounding=settings.rounding),
        listed("encode", ids),
    ]
    for name, (width, height) in _encoded(config, settings, task, seen_at):
        found.append(listed(name, spec((rows(name, 1), height, width, 3), jnp.float32)))
    if config.tiling is None and not tiled(*shape[1:]):
        found.append(listed("decode", spec((rows("decode", pictures), *shape), state)))
    return found


def _encoded(
    config: PipelineConfig, settings: Settings, task: Task, reference_size: tuple[int, int] | None
) -> list[tuple[Name, tuple[int, int]]]:
    """The programs that the pictures of a task are encoded by, each with a (width, height)."""
    seen: dict[tuple[Name, tuple[int, int]], None] = {}
    if reference_size is not None:
        seen["reference", reference_size] = None
    encoded = task.pictures - {"reference"}
    if config.controlnets and all(net.sees_pixels for net in config.controlnets):
        encoded -= {"control"}
    if encoded and config.tiling is None:
        sampled = task.drawn(settings.strength) != ("noise",) and settings.rounding != "bfl"
        seen["posterior" if sampled else "reference", (settings.width, settings.height)] = None
    return list(seen)


def _controls(
    config: PipelineConfig,
    n: int,
    settings: Settings,
    shape: tuple[int, ...],
    dtype: Any,
) -> tuple:
    """Shapes of `Drawn.controls`."""
    spec: Any = jax.ShapeDtypeStruct
    pixels = (n, settings.height, settings.width, 3)
    return tuple(
        (
            spec(pixels if net.sees_pixels else (n, *shape), dtype),
            spec((n,), jnp.int32) if net.num_mode else None,
        )
        for net in config.controlnets
    )


def tiled(rows: int, columns: int) -> bool:
    """Whether latents are decoded in tiles, by programs of `fluxjax.models.tiled_decode`."""
    return rows * columns > UNTILED_LATENTS
