"""Open-Sora 2.0: FLUX's text encoders, a transformer over the tokens of a clip, flow matching.

The state is latents with their channels last, (n, frames, rows, columns, channels); the network's
tokens are patches of them. Source: hpcaitech/Open-Sora `opensora/utils`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from fluxjax.config import ConfigError, OpenSoraPipelineConfig
from fluxjax.config.video_pipeline import VideoPipelineConfig
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
    Told,
)
from fluxjax.families.flux import FLUX
from fluxjax.families.noise_path import OPEN_SORA_FLOW, NoisePath
from fluxjax.models.latents import pack_video, text_ids, unpack_video, video_ids
from fluxjax.models.open_sora import OpenSoraTransformer
from fluxjax.schedules.flow_euler import flow_euler
from fluxjax.schedules.open_sora import (
    STEADY_STEPS,
    VideoGuidance,
    fewest_passes,
    open_sora_levels,
    open_sora_passes,
    shift_of,
)
from fluxjax.schedules.step_table import Run
from fluxjax.shapes import Params
from fluxjax.text.video_prompt import video_prompt

TASKS = {"OpenSoraPipeline": Task()}
_GIVEN = ({"reference"}, {"last"}, {"reference", "last"}, {"video"})


class Guided(NamedTuple):
    """How far a clip of so many latent frames is guided; `pictures`: what it is given."""

    guidance: VideoGuidance
    frames: int
    pictures: frozenset[str] = frozenset()


def tasks_of(config: OpenSoraPipelineConfig) -> list[Task]:
    """From text, first and last pictures, and a part of another clip, whose latents are drawn from
    their posterior."""
    orders = [[name for name in ("reference", "last", "video") if name in one] for one in _GIVEN]
    given = [
        Task(pictures=frozenset(one), draws=("noise", *one), channels=("given",)) for one in orders
    ]
    return [*TASKS.values(), *given]


def path(config: OpenSoraPipelineConfig) -> NoisePath:
    """How clips become noise, and what of that is predicted."""
    return OPEN_SORA_FLOW


def shift(config: OpenSoraPipelineConfig, frames: int, rows: int, columns: int) -> float:
    """As in sampling."""
    tokens = rows * columns // config.patch**2
    return math.log(shift_of(tokens, frames, config.scheduler))


def silenced(
    config: OpenSoraPipelineConfig,
    heard: Conditioning,
    empty: Conditioning,
    dropped: Bool[Array, "b encoders"],
) -> Conditioning:
    """`heard` with what the text encoders that a row has `dropped`, CLIP or T5, say of `empty`."""
    assert heard.vector is not None and empty.vector is not None
    no_clip, no_t5 = dropped[:, :1], dropped[:, 1:, None]
    vector = jnp.where(no_clip, empty.vector, heard.vector)
    return heard._replace(sequence=jnp.where(no_t5, empty.sequence, heard.sequence), vector=vector)


def joined(config: OpenSoraPipelineConfig) -> int:
    """Channels of the condition: which frames are given, and those."""
    return 1 + config.vae.latent_channels


def prompt_of(prompt: str, told: Told) -> str:
    """The prompt as a sentence, with the frames a second and how much moves; a negative one as it
    is."""
    if told.negative:
        return prompt
    return video_prompt(prompt, told.fps, str(told.motion) if told.motion else None)


def scale(config: OpenSoraPipelineConfig, asked: Guidance) -> Guided | None:
    """How far a clip is guided; None where there is one pass.

    Raises ConfigError for a second scale, and for a negative prompt that nothing hears.
    """
    if asked.true_cfg != 1:
        raise ConfigError(
            "true_cfg is for models that were distilled; guidance is this one's scale"
        )
    guidance = VideoGuidance(asked.guidance, asked.image, asked.oscillates, asked.oscillates)
    guided = Guided(guidance, config.latent_frames(asked.frames), asked.pictures)
    if passes(STEADY_STEPS, guided).shape[1]:
        return guided
    if asked.negative_prompt:
        raise ConfigError("negative_prompt needs another guidance than 1")
    return None


def networks(
    config: OpenSoraPipelineConfig, rounding: str, **fields: Any
) -> tuple[OpenSoraTransformer, tuple[()]]:
    """The one that draws; timesteps are rounded as in Open-Sora's code, which is BFL's."""
    rounded = "none" if rounding == "none" else "bfl"
    return OpenSoraTransformer(config.transformer, timestep_rounding=rounded, **fields), ()


def state_shape(
    config: VideoPipelineConfig, width: int, height: int, frames: int
) -> tuple[int, int, int, int]:
    """(channels, frames, rows, columns) of the latents of a clip.

    Raises ConfigError for sides that are no multiples of a token's, and other numbers of frames.
    """
    config.require_size(width, height)
    side = config.vae.scale
    return (
        config.vae.latent_channels,
        config.latent_frames(frames),
        height // side,
        width // side,
    )


def pack(latents: Float[AnyArray, "n c frames h w"], *, reference: bool = False) -> Tokens:
    """Channels last, with frame, row and column of each place."""
    places = jnp.moveaxis(jnp.indices(latents.shape[2:], jnp.float32), 0, -1)
    return Tokens(jnp.moveaxis(jnp.asarray(latents), 1, -1), places)


def unpack(
    values: Float[Array, "n frames h w c"], frames: int, rows: int, columns: int
) -> Float[Array, "n c frames h w"]:
    """Channels first."""
    return jnp.moveaxis(values, -1, 1)


def run(config: OpenSoraPipelineConfig, steps: Steps, frames: int, rows: int, columns: int) -> Run:
    """Euler steps over levels that the size of a clip shifts. Raises ConfigError for other ones."""
    others = (steps.sampler, steps.spacing, steps.sigmas)
    if steps.eta or any(other is not None for other in others):
        raise ConfigError(
            "Open-Sora's clips are drawn by Euler's steps alone: leave out sampler, spacing, "
            "sigmas and eta"
        )
    if not isinstance(steps.count, int):
        raise ConfigError("own sigmas are for pictures; here steps is their number")
    tokens = rows * columns // config.patch**2
    levels = open_sora_levels(steps.count, tokens, frames, config.scheduler, flow_shift=steps.shift)
    left = np.stack([1 - levels[:-1], levels[:-1]], axis=-1)
    plain = flow_euler(levels, first=steps.first)
    return Run(plain, np.zeros(len(left), np.bool_), left)


def passes(steps: int, scale: Guided | None) -> Float[np.ndarray, "steps differences frames"]:
    """As few as give what Open-Sora's three give: the prompt's, the negative prompt's, and that
    without what is given."""
    if scale is None:
        return np.zeros((steps, 0, 1), np.float32)
    guidance, frames, pictures = scale
    weights = open_sora_passes(steps, frames, guidance, pictures="video" not in pictures)
    return fewest_passes(weights, given=bool(pictures))


def forward(
    module: OpenSoraTransformer,
    variables: Params,
    x: Float[Array, "b frames h w c"],
    t: Float[Array, " b"],
    conditioning: Conditioning,
    extras: Extras,
    *,
    apply: Apply = nn.Module.apply,
    **capture: Any,
) -> Any:
    """The velocity (noise - data) of latents at the noise levels `t`, 1 = pure noise.

    `extras.channels`: of each place whether it is given, and what; None: nothing is. With
    `capture`, flax's `mutable` and `capture_intermediates`, the result is (velocity, state).
    """
    frames, rows, columns = x.shape[1:4]
    patch = module.config.patch_size
    returned: Any = apply(
        module,
        variables,
        _tokens(x, patch),
        _condition(module, extras, x.shape[:4]),
        conditioning.sequence,
        conditioning.vector,
        t,
        video_ids(frames, rows, columns, patch),
        text_ids(conditioning.sequence.shape[1]),
        **capture,
    )
    if capture:
        return _latents(returned[0], rows, columns, patch), returned[1]
    return _latents(returned, rows, columns, patch)


def hoist(
    module: OpenSoraTransformer,
    variables: Params,
    times: Float[Array, "steps"],
    conditioning: Conditioning,
    extras: Extras,
    *,
    apply: Apply = nn.Module.apply,
) -> tuple[Any, Callable[[Array, Any], Array]]:
    """`forward` for the steps of a run: text and condition are embedded once, and all modulations
    computed in one pass over their weights."""

    def method(name: str, *args: Any) -> Any:
        return apply(module, variables, *args, method=name)

    assert extras.positions is not None, "positions are those of `pack`"
    frames, rows, columns = extras.positions.shape[:3]
    patch, batch = module.config.patch_size, len(conditioning.sequence)
    text = method("embed_text", conditioning.sequence.astype(module.dtype))
    each = method("step_modulations", times, conditioning.vector)
    rope = method("rope", text_ids(text.shape[1]), video_ids(frames, rows, columns, patch))
    condition = method(
        "embed_condition", _condition(module, extras, (batch, frames, rows, columns))
    )

    def step(x: Array, modulations: Any) -> Array:
        tokens = _tokens(x.astype(module.dtype), patch)
        out = method("denoise", tokens, condition, text, modulations, rope)
        return _latents(out, rows, columns, patch)

    return each, step


def _tokens(x: Float[AnyArray, "b frames h w c"], patch: int) -> Float[Array, "b image d"]:
    return jnp.asarray(pack_video(jnp.moveaxis(x, -1, 1), patch))


def _latents(
    tokens: Float[Array, "b image d"], rows: int, columns: int, patch: int
) -> Float[Array, "b frames h w c"]:
    return jnp.moveaxis(jnp.asarray(unpack_video(tokens, rows, columns, patch)), 1, -1)


def _condition(
    module: OpenSoraTransformer, extras: Extras, size: tuple[int, ...]
) -> Float[Array, "b image cond_channels"]:
    """Of a state of `size`, which is its batch, frames, rows and columns."""
    patch = module.config.patch_size
    if extras.channels is not None:
        return _tokens(extras.channels.astype(module.dtype), patch)
    tokens = math.prod(size[1:]) // patch**2
    return jnp.zeros((size[0], tokens, module.config.cond_channels), module.dtype)


OPEN_SORA = Family(
    tasks=TASKS,
    tasks_of=tasks_of,
    joined=joined,
    tokenize=FLUX.tokenize,
    encode=FLUX.encode,
    encode_anew=FLUX.encode_anew,
    text_shapes=FLUX.text_shapes,
    prompt_of=prompt_of,
    scale=scale,
    networks=networks,
    state_shape=state_shape,
    pack=pack,
    unpack=unpack,
    run=run,
    first_step=FLUX.first_step,
    started=FLUX.started,
    passes=passes,
    forward=forward,
    hoist=hoist,
    path=path,
    shift=shift,
    silenced=silenced,
)
