"""Stable Diffusion 1 and 2: CLIP, and a UNet over latents that predicts their noise. Some were
distilled to hear the guidance scale, and to draw in a few steps.

Source: diffusers `StableDiffusionPipeline`, `StableDiffusionImg2ImgPipeline`,
`StableDiffusionInpaintPipeline`; `LatentConsistencyModelPipeline`,
`LatentConsistencyModelImg2ImgPipeline`; Luo et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fluxjax.config import ConfigError, PipelineConfig, StableDiffusionConfig
from fluxjax.config.sampler import SamplerConfig
from fluxjax.families.family import (
    AnyArray,
    Apply,
    Conditioning,
    Extras,
    Family,
    Guidance,
    Steps,
    Task,
    Tokens,
    hear_anew,
    second_prompts,
)
from fluxjax.families.noise_path import DiffusionPath
from fluxjax.models import lora
from fluxjax.models.clip import CLIPTextModel
from fluxjax.models.embeddings import guidance_sinusoid
from fluxjax.models.unet import UNet
from fluxjax.networks import network_of
from fluxjax.schedules.samplers import chosen, sampler_run
from fluxjax.schedules.step_table import Run
from fluxjax.shapes import Params
from fluxjax.text.cut_prompts import left_out

if TYPE_CHECKING:
    from fluxjax.text.tokenizers import PromptTokenizer

_IMAGE, _MASKED = frozenset({"image"}), frozenset({"image", "mask"})


class PromptIds(NamedTuple):
    """Token ids of a batch of prompts, for each text encoder, and how many of its last layers are
    left out."""

    ids: tuple[Int[AnyArray, "b l"], ...]
    skipped: Int[AnyArray, " b"]


def tasks(prefix: str, *, image: float, inpaint: float) -> dict[str, Task]:
    """diffusers' classes; `image` and `inpaint` are how much of an image they draw anew."""
    return {
        f"{prefix}Pipeline": Task(),
        f"{prefix}Img2ImgPipeline": Task(pictures=_IMAGE, draws=("image", "noise"), strength=image),
        f"{prefix}InpaintPipeline": Task(
            pictures=_MASKED,
            draws=("image", "noise", "masked"),
            channels=("mask", "masked"),
            strength=inpaint,
            from_noise=True,
        ),
    }


TASKS = tasks("StableDiffusion", image=0.8, inpaint=1.0)
CONSISTENT_TASKS = {
    name: task
    for name, task in tasks("LatentConsistencyModel", image=0.8, inpaint=1.0).items()
    if "mask" not in task.pictures
}


def tasks_of(every: dict[str, Task], config: Any) -> list[Task]:
    """Those of a model: a network that reads masked pictures does nothing else, and any other one
    inpaints by putting the image back."""
    if config.inpaints:
        return [task for task in every.values() if task.channels]
    return [
        replace(task, channels=(), keeps=True) if task.channels else task for task in every.values()
    ]


def joined(config: PipelineConfig) -> int:
    """Channels that the network reads besides those of its latents: a mask and a masked picture."""
    return config.networks[config.denoiser].in_channels - config.vae.latent_channels


def mask_channels(
    mask: Float[np.ndarray, "n height width"], config: PipelineConfig
) -> Float[np.ndarray, "n 1 rows columns"]:
    """A mask at the latents' size, by the pixel at each one's corner."""
    scale = config.vae.scale
    return mask[:, None, ::scale, ::scale]


def tokenize(
    tokenizers: Sequence[PromptTokenizer],
    prompts: Sequence[str],
    prompts_2: Sequence[str] | None = None,
    *,
    max_sequence_length: int,
    clip_skip: int = 0,
) -> tuple[PromptIds, list[str]]:
    """Token ids for each text encoder, and one line for each prompt whose end is not read.

    The last of two encoders reads `prompts_2` where given. Raises ValueError when the numbers of
    prompts differ.
    """
    longest = min(one.max_length for one in tokenizers)
    if max_sequence_length > longest:
        raise ConfigError(f"CLIP reads {longest} tokens, not {max_sequence_length}")
    second = second_prompts(prompts, prompts_2)
    if prompts_2 is not None and len(tokenizers) == 1:
        raise ConfigError("prompt_2 is for a second text encoder, and this model has one")
    texts = [*[prompts] * (len(tokenizers) - 1), second]
    read = [one(text, max_sequence_length) for one, text in zip(tokenizers, texts, strict=True)]
    skipped = np.full(len(prompts), clip_skip, np.int32)
    ids = PromptIds(tuple(one.input_ids for one in read), skipped)
    return ids, left_out(read[-1].removed, max_sequence_length)


@partial(jax.jit, static_argnames=("encoders", "apply"))
def encode(
    encoders: tuple[CLIPTextModel],
    params: tuple[Params],
    ids: PromptIds,
    *,
    apply: Apply = nn.Module.apply,
) -> Conditioning:
    """CLIP's states after its last norm, of the last layer or of one before."""
    (clip,), (weights,) = encoders, params
    layer = clip.config.num_hidden_layers - ids.skipped
    output: Any = apply(clip, lora.variables(weights), ids.ids[0], layer)
    return Conditioning(output.last_hidden_state, None, None)


def text_shapes(
    config: StableDiffusionConfig, count: int, length: int, dtype: Any
) -> tuple[PromptIds, Conditioning]:
    """Shapes of what `tokenize` and `encode` make of `count` prompts."""
    spec: Any = jax.ShapeDtypeStruct
    ids = (spec((count, length), jnp.int32),) * len(config.text_encoders)
    sequence = spec((count, length, config.text_width), dtype)
    return PromptIds(ids, spec((count,), jnp.int32)), Conditioning(sequence, None, None)


def scale(config: PipelineConfig, asked: Guidance) -> float | None:
    """Of classifier-free guidance; None where there is one pass, as where the UNet hears the scale.

    Raises ConfigError for a second scale, and for a negative prompt that nothing hears.
    """
    if asked.true_cfg != 1:
        raise ConfigError(
            "true_cfg is for models that were distilled; guidance is this one's scale"
        )
    if getattr(config.networks[config.denoiser], "time_cond_proj_dim", None) is not None:
        if asked.negative_prompt:
            raise ConfigError(
                "this UNet was distilled to hear the guidance scale, and draws in one pass: it "
                "hears no negative_prompt"
            )
        return None
    if asked.guidance > 1:
        return asked.guidance
    if asked.negative_prompt:
        raise ConfigError(f"negative_prompt needs guidance above 1, got {asked.guidance:g}")
    return None


def networks(config: StableDiffusionConfig, rounding: str, **fields: Any) -> tuple[UNet, tuple[()]]:
    """The one that draws; timesteps are numbers of the schedule in everybody's rounding."""
    attention = fields.pop("attention", "auto")
    if attention != "auto":
        raise ConfigError(f"attention of a UNet is auto, not {attention!r}")
    return network_of(config.unet).build(config.unet, **fields), ()


def state_shape(config: PipelineConfig, width: int, height: int) -> tuple[int, int, int]:
    """(channels, rows, columns) of the latents of a picture of `width` x `height` pixels.

    Raises ConfigError unless there are latents of that size.
    """
    config.require_size(width, height)
    return config.vae.latent_channels, height // config.vae.scale, width // config.vae.scale


def pack(latents: Float[AnyArray, "n c h w"], *, reference: bool = False) -> Tokens:
    """As the UNet reads them, channels last."""
    return Tokens(jnp.moveaxis(jnp.asarray(latents), 1, -1), None)


def unpack(values: Float[Array, "n h w c"], rows: int, columns: int) -> Float[Array, "n c h w"]:
    """Channels first."""
    return jnp.moveaxis(values, -1, 1)


def run(config: PipelineConfig, steps: Steps, rows: int, columns: int) -> Run:
    """As diffusers makes it of the folder's scheduler_config.json, or of another sampler that reads
    the same file. Raises ConfigError for what the sampler does not have."""
    count, first = steps.count, steps.first
    if not isinstance(count, int):
        raise ConfigError("own sigmas are for flows; here steps is their number")
    if steps.shift is not None:
        raise ConfigError("flow_shift is for flows, and this model is none")
    own: Any = config.scheduler
    asked = chosen(own, steps.sampler, spacing=steps.spacing, sigmas=steps.sigmas)
    if steps.paints and config.paints_without_runge_kutta:
        asked = replace(asked, skip_prk_steps=True)
    choices: dict[str, Any] = {}
    if asked.sampler == "DDIMScheduler":
        choices["eta"] = steps.eta
    elif steps.eta:
        raise ConfigError(f"eta is how much noise DDIM adds, and this is {asked.sampler}")
    if config.all_steps and asked.sampler == "LCMScheduler":
        choices["strength"] = steps.strength
        first = 0
    if first == count:
        raise _none_left(count, steps.strength)
    whole = sampler_run(asked, count, **choices)
    if steps.begin is not None:
        return _handed_over(asked, whole, count, steps.begin, **choices)
    found = whole
    if first:
        found = sampler_run(asked, count, first * whole.order, **choices)
    if steps.end is None:
        return found
    found = found.until(_time_of(asked, steps.end))
    if not len(found.schedule.times):
        raise ConfigError(
            f"a refiner that starts at {steps.end:g} of {count} steps leaves the base model "
            "none to run"
        )
    return found


def _handed_over(config: SamplerConfig, whole: Run, count: int, part: float, **choices: Any) -> Run:
    """What is left of a run that another model has begun; its latents are noisy as they are."""
    first = whole.first_after(_time_of(config, part))
    if first >= len(whole.schedule.times):
        raise ConfigError(f"a refiner that starts at {part:g} of {count} steps has none to run")
    return sampler_run(config, count, first, **choices)._replace(scale=1.0)


def _time_of(config: SamplerConfig, part: float) -> int:
    """The timestep after that part of the way from noise, as diffusers rounds it."""
    count: Any = config.complete().num_train_timesteps
    return round(count - part * count)


def first_step(steps: int, strength: float, *, rounding: str = "diffusers") -> int:
    """The first step that image to image runs. Raises ConfigError where `strength` leaves none."""
    if not 0.0 < strength <= 1.0:
        raise ConfigError(f"strength must be above 0 and at most 1, got {strength}")
    first = steps - int(steps * strength)
    if first == steps:
        raise _none_left(steps, strength)
    return first


def first_of_few(steps: int, strength: float, *, rounding: str = "diffusers") -> int:
    """`first_step` of a model that draws in so few steps that a sampler which runs them all may be
    left none by the others."""
    return steps if 0.0 < strength * steps < 1.0 else first_step(steps, strength)


def _none_left(steps: int, strength: float) -> ConfigError:
    return ConfigError(f"{steps} steps with a strength of {strength:g} leave none to draw with")


def started(
    image: Float[np.ndarray, "n c h w"], noise: Float[np.ndarray, "n c h w"], run: Run
) -> Float[np.ndarray, "n c h w"]:
    """The latents before the first step that is run: the image with as much noise as that has."""
    signal, level = run.levels[run.schedule.first].astype(noise.dtype)
    return signal * image + level * noise


def passes(steps: int, scale: float | None) -> Float[np.ndarray, "steps differences"]:
    """As FLUX's: one pass, or the prompt's and the negative one's."""
    return np.full((steps, 0 if scale is None else 1), scale or 0.0, np.float32)


def forward(
    module: UNet,
    variables: Params,
    x: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    conditioning: Conditioning,
    extras: Extras,
    *,
    apply: Apply = nn.Module.apply,
    **capture: Any,
) -> Any:
    """What the UNet was trained to predict of latents at the timesteps `t`, 0 (clean) to 999.

    With `capture`, flax's `mutable` and `capture_intermediates`, the result is (output, state).
    """
    heard = (conditioning.sequence, conditioning.vector, conditioning.sizes)
    told = module.config.time_cond_proj_dim
    if told is not None:
        assert extras.guidance is not None
        heard += (guidance_sinusoid(jnp.asarray(extras.guidance), told),)
    return apply(module, variables, with_channels(x, extras), t, *heard, **capture)


def with_channels(x: Float[Array, "b h w c"], extras: Extras) -> Float[Array, "b h w all"]:
    """All channels that the network sees, of which the first are the state's."""
    if extras.channels is None:
        return x
    return jnp.concatenate([x, extras.channels.astype(x.dtype)], axis=-1)


def hoist(
    module: UNet,
    variables: Params,
    times: Float[Array, "steps"],
    conditioning: Conditioning,
    extras: Extras,
    *,
    apply: Apply = nn.Module.apply,
) -> tuple[Float[Array, "steps"], Callable[[Array, Array], Array]]:
    """`forward` for the steps of a run, whose own are their timesteps."""

    def step(x: Array, time: Array) -> Array:
        t = jnp.broadcast_to(time, (len(x),))
        x = x.astype(module.dtype)
        return forward(module, variables, x, t, conditioning, extras, apply=apply)

    return jnp.asarray(times), step


def path(config: StableDiffusionConfig) -> DiffusionPath:
    """The diffusion's, of the scheduler's noise levels."""
    return DiffusionPath.of(config.scheduler)


STABLE_DIFFUSION = Family(
    tasks=TASKS,
    tasks_of=partial(tasks_of, TASKS),
    joined=joined,
    mask_channels=mask_channels,
    tokenize=tokenize,
    encode=encode,
    encode_anew=partial(hear_anew, encode),
    text_shapes=text_shapes,
    scale=scale,
    networks=networks,
    state_shape=state_shape,
    pack=pack,
    unpack=unpack,
    run=run,
    first_step=first_step,
    started=started,
    passes=passes,
    forward=forward,
    hoist=hoist,
    path=path,
)
LATENT_CONSISTENCY = replace(
    STABLE_DIFFUSION,
    tasks=CONSISTENT_TASKS,
    tasks_of=partial(tasks_of, CONSISTENT_TASKS),
    first_step=first_of_few,
)
