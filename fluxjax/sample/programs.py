"""The programs of a pipeline as pure functions, and the list of those that a picture needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from fluxjax.checkpoint.templates import Part
from fluxjax.config import PipelineConfig
from fluxjax.families.family import (
    AnyArray,
    Apply,
    Conditioning,
    Control,
    Extras,
    Family,
    LeftOut,
    Steps,
    Task,
    Tokens,
)
from fluxjax.models.absent import with_zeros
from fluxjax.models.autoencoder import Autoencoder, denormalize_latents, normalize_latents
from fluxjax.models.lora import stack_passes, variables
from fluxjax.models.transformer_blocks import ImagePrompt
from fluxjax.sample import denoise as sampler
from fluxjax.sample.ip_adapter import Attended
from fluxjax.sample.settings import Rounding, Settings
from fluxjax.sample.skip_layers import left_out_shapes
from fluxjax.schedules.schedule import Schedule, pad
from fluxjax.shapes import Params

Name = Literal["encode", "reference", "posterior", "before", "denoise", "decode"]
NAMES: tuple[Name, ...] = get_args(Name)
OF_RUNS: tuple[Name, ...] = ("before", "denoise")
OF_PICTURES: tuple[Name, ...] = ("reference", "posterior", "decode")
UNTILED_LATENTS = 256 * 256
WHOLE = ("schedule", "passes", "control_scales", "image_prompt_scales", "rescale", "left_out")
"""Of Drawn: the same for all pictures."""
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


class Drawn(NamedTuple):
    """What `denoise_pictures` draws with: what is in WHOLE is data for all pictures, the rest has a
    row for each."""

    schedule: Schedule
    passes: Float[AnyArray, "steps differences *frames"]
    conditionings: tuple[Conditioning, ...]
    """One for each pass."""
    guidance: Float[AnyArray, "n"]
    reference: Float[AnyArray, "n c rows columns"] | None = None
    """Latents of a picture to edit, perhaps of another size."""
    channels: tuple[Float[AnyArray, "n more *size"], ...] | None = None
    """Of each pass what is joined to the state's channels."""
    kept: sampler.Kept | None = None
    """Its mask has one channel."""
    controls: tuple[tuple[AnyArray, Int[AnyArray, "n"] | None], ...] = ()
    """Of each ControlNet what it sees, latents or pixels, and its mode."""
    image_prompts: tuple[tuple[Attended, ...], ...] = ()
    """Of each pass and each IP-Adapter, where there are any."""
    control_scales: tuple[Float[AnyArray, "steps"], ...] = ()
    image_prompt_scales: tuple[Float[AnyArray, "layers"], ...] = ()
    noise: Float[AnyArray, "n steps c *size"] | None = None
    """What each step adds, where a sampler may."""
    rescale: Float[AnyArray, ""] | None = None
    """Of guidance; None: 0."""
    left_out: LeftOut | None = None
    """Skip-layer guidance."""


@partial(jax.jit, static_argnames=("family", "module", "controlnets", "apply"))
def before_steps(
    family: Family,
    module: Any,
    controlnets: tuple[Any, ...],
    params: Params,
    controlnet_params: tuple[Params, ...],
    state: sampler.State,
    drawn: Drawn,
    apply: Apply = nn.Module.apply,
) -> Any:
    """What `denoise_pictures` takes as `each`: of every step what is the same whatever the picture.

    Parameters that only steps use may be absent.
    """
    nets = controlnets, controlnet_params
    return _hoisted(family, module, nets, params, state, drawn, apply)[0]


@partial(jax.jit, static_argnames=("family", "module", "controlnets", "apply"))
def denoise_pictures(
    family: Family,
    module: Any,
    controlnets: tuple[Any, ...],
    params: Params,
    controlnet_params: tuple[Params, ...],
    state: sampler.State,
    drawn: Drawn,
    each: Any = None,
    apply: Apply = nn.Module.apply,
) -> sampler.State:
    """Runs the schedule on a state of unpacked latents, (n, c, h, w) or (n, c, frames, h, w).

    `params` may come with a LoRA (`fluxjax.models.lora.adapt`). `controlnets` are modules, with a
    picture for each in `drawn`. With `each`, which `before_steps` gives, those parameters may be
    absent that it alone uses.
    """
    size = state[0].shape[2:]
    nets = controlnets, controlnet_params
    hoisted, step, alone = _hoisted(family, module, nets, params, state, drawn, apply)
    each, by_itself = hoisted if each is None else each
    packed = tuple(family.pack(latents).values for latents in state)
    kept = None
    if drawn.kept is not None:
        mask = jnp.broadcast_to(drawn.kept.mask, state[0].shape)
        kept = jax.tree.map(lambda x: family.pack(x).values, drawn.kept._replace(mask=mask))
    noise = None
    if drawn.noise is not None:
        noise = jax.vmap(lambda latents: family.pack(latents).values)(jnp.asarray(drawn.noise))
    packed = sampler.denoise(
        step,
        each,
        packed,
        drawn.schedule,
        drawn.passes,
        alone=None if alone is None else (alone, by_itself),
        noise=noise,
        kept=kept,
        rescale=drawn.rescale,
    )
    return tuple(family.unpack(tokens, *size) for tokens in packed)


def _hoisted(
    family: Family,
    module: Any,
    controlnets: tuple[tuple[Any, ...], tuple[Params, ...]],
    params: Params,
    state: sampler.State,
    drawn: Drawn,
    apply: Apply,
) -> tuple[tuple[Any, Any], sampler.Step, sampler.Step | None]:
    """`Family.hoist` of all passes, and of the first alone where weights of frames, as Open-Sora's
    guidance has them, may leave steps to it.

    All are one batch, not several passes over the weights, unless their texts have several lengths
    (Redux beside a negative prompt).
    """
    lengths = [heard.sequence.shape[1] for heard in drawn.conditionings]
    ends = [i for i in range(1, len(lengths)) if lengths[i] != lengths[i - 1]]
    spans = [slice(*ends) for ends in zip([0, *ends], [*ends, len(lengths)], strict=True)]
    hoist = partial(_hoisted_passes, family, module, controlnets, params, state, drawn, apply)
    found = [hoist(span) for span in spans]
    by_itself, alone = None, None
    if drawn.passes.ndim == 3 and len(lengths) > 1:
        by_itself, alone = hoist(slice(0, 1))
    if len(found) == 1:
        each, step = found[0]
        return (each, by_itself), step, alone

    def each_span(x: Array, each: Any) -> Array:
        rows = len(x) // len(lengths)
        parts = zip(jnp.split(x, [end * rows for end in ends]), each, found, strict=True)
        return jnp.concatenate([run(part, one) for part, one, (_, run) in parts])

    return (tuple(each for each, _ in found), by_itself), each_span, alone


def _hoisted_passes(
    family: Family,
    module: Any,
    controlnets: tuple[tuple[Any, ...], tuple[Params, ...]],
    params: Params,
    state: sampler.State,
    drawn: Drawn,
    apply: Apply,
    span: slice,
) -> tuple[Any, sampler.Step]:
    """Of the passes of `span`, stacked in the batch."""
    heard = drawn.conditionings[span]
    positions, many = family.pack(state[0]).positions, len(heard)
    stack = partial(jax.tree.map, lambda *leaves: jnp.concatenate(leaves))
    reference = None
    if drawn.reference is not None:
        tokens = family.pack(drawn.reference, reference=True)
        reference = Tokens(stack(*[tokens.values] * many), tokens.positions)
    channels = None
    if drawn.channels is not None:
        channels = stack(*(family.pack(one).values for one in drawn.channels[span]))
    nets = zip(*controlnets, drawn.controls, drawn.control_scales, strict=True)
    first = drawn.conditionings[0] if span.start else None
    controls = tuple(
        Control(net, {"params": weights}, seen, scale, mode, first)
        for net, weights, (seen, mode), scale in nets
    )
    attended: Any = stack(*drawn.image_prompts[span]) if drawn.image_prompts else ()
    prompts = tuple(
        ImagePrompt(jnp.moveaxis(keys, 1, 0), jnp.moveaxis(values, 1, 0), jnp.asarray(scale))
        for (keys, values), scale in zip(attended, drawn.image_prompt_scales, strict=True)
    )
    guidance = jnp.tile(drawn.guidance, many)
    extras = Extras(positions, guidance, reference, channels, controls, prompts, drawn.left_out)
    return family.hoist(
        module,
        stack_passes(variables(with_zeros(params)), many),
        drawn.schedule.times,
        stack(*heard),
        extras,
        apply=apply,
    )


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
    _, longer = family.text_shapes(config, n, text + more_text, dtype)
    _, conditioning = family.text_shapes(config, n, text, dtype)
    run = family.run(config, course or settings.course(family.first_step), *shape[1:])
    table = run.keeping if task.keeps else run.schedule
    table = pad(table) if padded else table
    schedule = jax.tree.map(lambda x: spec(x.shape, x.dtype), table)
    steps = len(schedule.times)
    asked = settings.asked_guidance._replace(pictures=task.pictures)
    weights = family.passes(len(run.schedule.times), family.scale(config, asked))
    many = weights.shape[1] + 1
    reference = channels = kept = None
    if config.tiling is not None:
        reference_size = None
    if "reference" in task.pictures and reference_size is not None:
        reference = spec((n, *family.shape_of(config, *reference_size)), dtype)
    if task.channels:
        channels = (spec((n, family.joined(config), *shape[1:]), dtype),) * many
    if task.keeps:
        noise = spec((n, *shape), state)
        kept = sampler.Kept(spec((n, 1, *shape[1:]), jnp.float32), noise, noise)
    drawn = Drawn(
        schedule,
        spec((steps, *weights.shape[1:]), jnp.float32),
        (longer, *[conditioning] * (many - 1)),
        spec((n,), jnp.float32),
        reference,
        channels,
        kept,
        _controls(config, n, settings, shape, dtype),
        (tuple((spec((n, *one), dtype),) * 2 for one in image_prompts),) * many
        if image_prompts
        else (),
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
    seen: dict[tuple[Name, tuple[int, int]], None] = {}
    if reference_size is not None and "reference" in task.pictures:
        seen["reference", reference_size] = None
    encoded = task.pictures - {"reference"}
    if config.controlnets and all(net.sees_pixels for net in config.controlnets):
        encoded -= {"control"}
    if encoded and config.tiling is None:
        sampled = task.drawn(settings.strength) != ("noise",) and settings.rounding != "bfl"
        seen["posterior" if sampled else "reference", (settings.width, settings.height)] = None
    for name, (width, height) in seen:
        found.append(listed(name, spec((rows(name, 1), height, width, 3), jnp.float32)))
    if config.tiling is None and not tiled(*shape[1:]):
        found.append(listed("decode", spec((rows("decode", pictures), *shape), state)))
    return found


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
