"""Stable Diffusion 3 and 3.5: two CLIPs and T5, a joint transformer, flow matching.

Source: diffusers `StableDiffusion3Pipeline`, `StableDiffusion3Img2ImgPipeline`,
`StableDiffusion3InpaintPipeline`; Esser et al. 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from fluxjax.config import ConfigError, SD3PipelineConfig
from fluxjax.families.family import (
    Apply,
    Conditioning,
    Extras,
    LeftOut,
    Steps,
    second_prompts,
)
from fluxjax.families.noise_path import FlowPath
from fluxjax.families.sdxl import read_clips
from fluxjax.families.stable_diffusion import (
    STABLE_DIFFUSION,
    PromptIds,
    tasks,
    tasks_of,
    with_channels,
)
from fluxjax.models import lora
from fluxjax.models.sd3 import Modulations, SD3Transformer
from fluxjax.networks import network_of
from fluxjax.schedules.flow_euler import flow_euler, own_levels, start_step
from fluxjax.schedules.samplers import chosen, sampler_run
from fluxjax.schedules.sigma_levels import flow_levels
from fluxjax.schedules.step_table import Run
from fluxjax.shapes import Params
from fluxjax.text.cut_prompts import left_out

if TYPE_CHECKING:
    from fluxjax.text.tokenizers import PromptTokenizer

Each = tuple[Modulations, LeftOut | None]
"""What each step of a run has of its own."""
TASKS = tasks("StableDiffusion3", image=0.6, inpaint=0.6)
_CLIPS = 2
_CLIP_NAMES, _T5_NAME = ("text_encoder", "text_encoder_2"), "text_encoder_3"
PATH = FlowPath(time_scale=1000.0)


def tokenize(
    tokenizers: Sequence[PromptTokenizer],
    prompts: Sequence[str],
    prompts_2: Sequence[str] | None = None,
    prompts_3: Sequence[str] | None = None,
    *,
    max_sequence_length: int,
    clip_skip: int = 0,
) -> tuple[PromptIds, list[str]]:
    """Token ids for each text encoder, and one line for each prompt whose end is not read.

    The second CLIP reads `prompts_2` and T5 `prompts_3` where given. Without a T5 its ids are
    zeros, whose number counts. Raises ValueError when the numbers of prompts differ.
    """
    texts = [prompts, *(second_prompts(prompts, other) for other in (prompts_2, prompts_3))]
    read = [one(text) for one, text in zip(tokenizers[:_CLIPS], texts, strict=False)]
    length, shape = tokenizers[0].max_length, (len(prompts), max_sequence_length)
    t5 = np.zeros(shape, np.int32)
    removed = read[0].removed
    if len(tokenizers) > _CLIPS:
        heard = tokenizers[_CLIPS](texts[_CLIPS], max_sequence_length)
        t5, removed, length = heard.input_ids, heard.removed, max_sequence_length
    skipped = np.full(len(prompts), clip_skip, np.int32)
    return PromptIds((*(one.input_ids for one in read), t5), skipped), left_out(removed, length)


@partial(jax.jit, static_argnames=("encoders", "apply"))
def encode(
    encoders: tuple[Any, ...],
    params: tuple[Params, ...],
    ids: PromptIds,
    *,
    apply: Apply = nn.Module.apply,
) -> Conditioning:
    """The CLIPs' states side by side, filled up with zeros, and then T5's, of its padding too; and
    both CLIPs' pooled projections. Without T5 zeros, in the width of the others."""
    states, vector = _read_clips(encoders[:_CLIPS], params[:_CLIPS], ids, apply)
    if len(encoders) > _CLIPS:
        t5 = jnp.asarray(apply(encoders[_CLIPS], lora.variables(params[_CLIPS]), ids.ids[_CLIPS]))
    else:
        t5 = jnp.zeros((*ids.ids[_CLIPS].shape, states.shape[-1]), states.dtype)
    sequence = jnp.concatenate([widened(states, t5.shape[-1]), t5], axis=1)
    return Conditioning(sequence, None, vector)


def _read_clips(
    encoders: tuple[Any, ...], params: tuple[Params, ...], ids: PromptIds, apply: Apply
) -> tuple[Float[Array, "b text d"], Float[Array, "b pooled"]]:
    """Side by side the states of both, and their pooled projections."""
    outputs = read_clips(encoders, params, ids, apply)
    states = jnp.concatenate([one.penultimate_hidden_state for one in outputs], axis=-1)
    return states, jnp.concatenate([one.text_embeds for one in outputs], axis=-1)


def encode_anew(
    encoders: Mapping[str, Any],
    params: Mapping[str, Params],
    ids: PromptIds,
    heard: Conditioning,
    *,
    apply: Apply = nn.Module.apply,
) -> Conditioning:
    """`heard`, with what both CLIPs, T5 or all of them, by component, say now in place of what they
    said."""
    sequence, vector = heard.sequence, heard.vector
    clips, t5 = jnp.split(sequence, [ids.ids[0].shape[1]], axis=1)
    names = tuple(name for name in _CLIP_NAMES if name in encoders)
    if names:
        mine = tuple(params[name] for name in names)
        states, vector = _read_clips(tuple(encoders[n] for n in names), mine, ids, apply)
        clips = widened(states, sequence.shape[-1])
    if _T5_NAME in encoders:
        leaves = lora.variables(params[_T5_NAME])
        t5 = jnp.asarray(apply(encoders[_T5_NAME], leaves, ids.ids[_CLIPS]))
    return Conditioning(jnp.concatenate([clips, t5], axis=1), None, vector)


def widened(states: Float[Array, "b text d"], width: int) -> Float[Array, "b text width"]:
    """With zeros up to `width`."""
    return jnp.pad(states, ((0, 0), (0, 0), (0, width - states.shape[-1])))


def text_shapes(
    config: SD3PipelineConfig, count: int, length: int, dtype: Any
) -> tuple[PromptIds, Conditioning]:
    """Shapes of what `tokenize` and `encode` make of `count` prompts, of which T5 reads `length`
    tokens."""
    spec: Any = jax.ShapeDtypeStruct
    clip = config.text_encoder.max_position_embeddings
    ids = tuple(spec((count, one), jnp.int32) for one in (clip, clip, length))
    t5 = config.text_encoder_3
    width = sum(one.hidden_size for one in config.clips) if t5 is None else t5.d_model
    sequence = spec((count, clip + length, width), dtype)
    vector = spec((count, config.transformer.pooled_projection_dim), dtype)
    return PromptIds(ids, spec((count,), jnp.int32)), Conditioning(sequence, None, vector)


def networks(
    config: SD3PipelineConfig, rounding: str, **fields: Any
) -> tuple[SD3Transformer, tuple[()]]:
    """The one that draws; timesteps are those of the schedule in everybody's rounding."""
    return network_of(config.transformer).build(config.transformer, **fields), ()


def run(config: SD3PipelineConfig, steps: Steps, rows: int, columns: int) -> Run:
    """As diffusers makes it of the folder's scheduler_config.json, or of another sampler of flows.
    Raises ConfigError for what a flow does not have."""
    if steps.eta:
        raise ConfigError("eta is how much noise DDIM adds, and this model is a flow")
    asked = chosen(config.scheduler, steps.sampler, spacing=steps.spacing, sigmas=steps.sigmas)
    if steps.shift is not None:
        asked = replace(asked, use_dynamic_shifting=False, shift=steps.shift)
    patch = config.transformer.patch_size
    mu = asked.mu(rows // patch * (columns // patch)) if asked.use_dynamic_shifting else None
    euler = asked.sampler == "FlowMatchEulerDiscreteScheduler"
    if euler and not asked.stochastic_sampling:
        count, own = own_levels(steps.count)
        levels, times = flow_levels(asked.complete(), count, mu, own)
        plain = flow_euler(np.asarray(levels, np.float32), first=steps.first)
        plain = plain._replace(times=np.asarray(times, np.float32))
        kept = np.stack([1 - levels[:-1], levels[:-1]], axis=-1)
        return Run(plain, np.zeros(count, np.bool_), kept)
    if not isinstance(steps.count, int):
        raise ConfigError("own sigmas are stepped along by Euler's sampler")
    order = sampler_run(asked, steps.count, mu=mu).order if steps.first else 1
    return sampler_run(asked, steps.count, steps.first * order, mu=mu)


def forward(
    module: SD3Transformer,
    variables: Params,
    x: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    conditioning: Conditioning,
    extras: Extras,
    *,
    apply: Apply = nn.Module.apply,
    **capture: Any,
) -> Any:
    """The velocity (noise - data) of latents at the timesteps `t`, 0 (clean) to 1000 (pure noise).

    With `capture`, flax's `mutable` and `capture_intermediates`, the result is (velocity, state).
    """
    text = widened(jnp.asarray(conditioning.sequence), module.config.joint_attention_dim)
    seen, pooled = with_channels(x, extras), jnp.asarray(conditioning.vector)
    out: Any = apply(module, variables, seen, text, pooled, t, **capture)
    if extras.left_out is None:
        return out

    def without(rows: int, blocks: Bool[Array, "layers rows"]) -> Array:
        given = (part[:rows] for part in (seen, text, pooled, t))
        return apply(module, lora.first_pass(variables), *given, blocks)

    return moved_away(out, without, extras.left_out)


def hoist(
    module: SD3Transformer,
    variables: Params,
    times: Float[Array, "steps"],
    conditioning: Conditioning,
    extras: Extras,
    *,
    apply: Apply = nn.Module.apply,
) -> tuple[Each, Callable[[Array, Each], Array]]:
    """`forward` for the steps of a run: text and all modulations are computed once."""

    def method(name: str, *args: Any, of: Params = variables) -> Any:
        return apply(module, of, *args, method=name)

    states = widened(jnp.asarray(conditioning.sequence), module.config.joint_attention_dim)
    text = method("embed_text", states.astype(module.dtype))
    modulations = method("step_modulations", jnp.asarray(times), conditioning.vector)

    def step(x: Array, each: Each) -> Array:
        modulations, left = each
        size = x.shape[1:3]
        patches = method("patchify", with_channels(x, extras).astype(module.dtype))
        positions = method("positions", *size)
        out = method("denoise", patches, positions, text, modulations, None)

        def without(rows: int, blocks: Bool[Array, "layers rows"]) -> Array:
            first = jax.tree.map(lambda part: part[:, :rows], modulations.blocks)
            own = Modulations(first, modulations.out[:rows])
            given = (patches[:rows], positions, text[:rows], own, blocks)
            return method("denoise", *given, of=lora.first_pass(variables))

        if left is not None:
            out = moved_away(out, without, left)
        return method("unpatchify", out, *size)

    return (modulations, extras.left_out), step


def moved_away(
    out: Float[Array, "two_b *shape"],
    without: Callable[[int, Bool[Array, "layers b"]], Float[Array, "b *shape"]],
    left: LeftOut,
) -> Float[Array, "two_b *shape"]:
    """Skip-layer guidance: `out` of two passes, whose first is moved away from what it is `without`
    some blocks, a third pass that is run only where it counts."""
    rows = len(out) // 2

    def moved() -> Array:
        blocks = jnp.broadcast_to(jnp.asarray(left.blocks)[:, None], (len(left.blocks), rows))
        first = out[:rows]
        difference = (first - without(rows, blocks)).astype(jnp.float32)
        return out.at[:rows].add((left.weight * difference).astype(out.dtype))

    return jax.lax.cond(jnp.asarray(left.weight) != 0, moved, lambda: out)


def shift(config: SD3PipelineConfig, rows: int, columns: int) -> float:
    """As in sampling."""
    scheduler, patch = config.scheduler.complete(), config.transformer.patch_size
    if scheduler.use_dynamic_shifting:
        return scheduler.mu(rows // patch * (columns // patch))
    return math.log(scheduler.shift or 1.0)


def silenced(
    config: SD3PipelineConfig,
    heard: Conditioning,
    empty: Conditioning,
    dropped: Bool[Array, "b encoders"],
) -> Conditioning:
    """`heard` with zeros in place of what the text encoders that a row has `dropped` say, each by
    itself (Esser et al. 2024, section 4): any of them may then be left out when drawing."""
    sequence, vector = jnp.asarray(heard.sequence), jnp.asarray(heard.vector)
    length = config.text_encoder.max_position_embeddings
    first = np.arange(sequence.shape[1]) < length
    states = np.searchsorted(
        np.cumsum([clip.hidden_size for clip in config.clips]),
        np.arange(sequence.shape[2]),
        side="right",
    )
    pooled = np.repeat([0, 1], [clip.projection_dim for clip in config.clips])
    for i in range(len(config.text_encoders)):
        # Of the states: CLIPs side by side in the first tokens, then T5's.
        mine = first[:, None] & (states == i)[None] if i < _CLIPS else ~first[:, None]
        sequence = jnp.where(dropped[:, i, None, None] & mine[None], 0.0, sequence)
        vector = jnp.where(dropped[:, i, None] & (pooled == i)[None], 0.0, vector)
    return heard._replace(sequence=sequence, vector=vector)


SD3 = replace(
    STABLE_DIFFUSION,
    tasks=TASKS,
    tasks_of=partial(tasks_of, TASKS),
    tokenize=tokenize,
    encode=encode,
    encode_anew=encode_anew,
    text_shapes=text_shapes,
    networks=networks,
    run=run,
    first_step=start_step,
    forward=forward,
    hoist=hoist,
    path=lambda config: PATH,
    shift=shift,
    silenced=silenced,
)
