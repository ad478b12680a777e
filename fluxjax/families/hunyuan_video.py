"""HunyuanVideo: a language model and CLIP, a transformer over the tokens of a clip, flow matching.

The state is latents with their channels last, as Open-Sora's. Source: diffusers
`HunyuanVideoPipeline`; Kong et al. 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fluxjax.config import ConfigError, HunyuanVideoPipelineConfig
from fluxjax.families.family import (
    AnyArray,
    Apply,
    Conditioning,
    Extras,
    Family,
    Steps,
    Task,
    second_prompts,
)
from fluxjax.families.flux import FLUX, flow_run
from fluxjax.families.noise_path import FlowPath
from fluxjax.families.open_sora import OPEN_SORA
from fluxjax.models import lora
from fluxjax.models.clip import CLIPTextModel
from fluxjax.models.hunyuan_video import HunyuanVideoTransformer
from fluxjax.models.llama import LlamaModel
from fluxjax.networks import network_of
from fluxjax.schedules.step_table import Run
from fluxjax.shapes import Params
from fluxjax.text.cut_prompts import left_out
from fluxjax.text.prompt_template import VIDEO, templated

if TYPE_CHECKING:
    from fluxjax.models.flux import Modulations
    from fluxjax.text.tokenizers import PromptTokenizer

Each = tuple[Float[Array, "steps"], "Modulations"]
"""What each step of a run has of its own: its timestep, which the text is refined for."""
TASKS = {"HunyuanVideoPipeline": Task()}
PATH = FlowPath(time_scale=1000.0)


class PromptIds(NamedTuple):
    """Token ids of a batch of prompts: of the language model those of its whole template, where
    `mask` is 1 at what is not padding."""

    llama: Int[AnyArray, "b whole"]
    mask: Int[AnyArray, "b whole"]
    clip: Int[AnyArray, "b l"]


def tasks_of(config: HunyuanVideoPipelineConfig) -> list[Task]:
    """The one of its class in model_index.json."""
    return [TASKS[config.class_name]]


def joined(config: HunyuanVideoPipelineConfig) -> int:
    """Channels of a first frame that is given: which frame it is, and its latents."""
    return 1 + config.vae.latent_channels


def tokenize(
    tokenizers: Sequence[PromptTokenizer],
    prompts: Sequence[str],
    prompts_2: Sequence[str] | None = None,
    *,
    max_sequence_length: int,
) -> tuple[PromptIds, list[str]]:
    """Token ids, and one line for each prompt whose end the language model does not read.

    CLIP reads `prompts_2` where given; its 77 tokens are cut silently. Raises ValueError when the
    numbers of prompts differ, ConfigError for a tokenizer that is not the model's.
    """
    second = second_prompts(prompts, prompts_2, empty=True)
    llama, clip = tokenizers
    read = templated(llama, prompts, VIDEO, max_sequence_length=max_sequence_length)
    if (read.attention_mask.sum(axis=1) <= VIDEO.crop).any():
        raise ConfigError(
            f"{llama.where} is another model's: HunyuanVideo's words around a prompt are "
            f"{VIDEO.crop} tokens of the model's own, and here no more with a prompt among them"
        )
    ids = PromptIds(read.input_ids, read.attention_mask, clip(second).input_ids)
    return ids, left_out(read.removed, max_sequence_length)


@partial(jax.jit, static_argnames=("encoders", "apply"))
def encode(
    encoders: tuple[LlamaModel, CLIPTextModel],
    params: tuple[Params, Params],
    ids: PromptIds,
    *,
    apply: Apply = nn.Module.apply,
) -> Conditioning:
    """The language model's states from the prompt on, without those of the template before it, and
    CLIP's pooled state."""
    (llama, clip), (llama_params, clip_params) = encoders, params
    states = jnp.asarray(apply(llama, lora.variables(llama_params), ids.llama, ids.mask))
    pooled: Any = apply(clip, lora.variables(clip_params), ids.clip)
    mask = jnp.asarray(ids.mask)[:, VIDEO.crop :]
    return Conditioning(states[:, VIDEO.crop :], mask, pooled.pooler_output)


def text_shapes(
    config: HunyuanVideoPipelineConfig, count: int, length: int, dtype: Any
) -> tuple[PromptIds, Conditioning]:
    """Shapes of what `tokenize` and `encode` make of `count` prompts."""
    spec: Any = jax.ShapeDtypeStruct
    whole = spec((count, VIDEO.crop + length), jnp.int32)
    clip = spec((count, config.text_encoder_2.max_position_embeddings), jnp.int32)
    sequence = spec((count, length, config.text_encoder.hidden_size), dtype)
    vector = spec((count, config.text_encoder_2.hidden_size), dtype)
    mask = spec((count, length), jnp.int32)
    return PromptIds(whole, whole, clip), Conditioning(sequence, mask, vector)


def networks(
    config: HunyuanVideoPipelineConfig, rounding: str, **fields: Any
) -> tuple[HunyuanVideoTransformer, tuple[()]]:
    """The one that draws; timesteps are those of the schedule in everybody's rounding."""
    return network_of(config.transformer).build(config.transformer, **fields), ()


def run(
    config: HunyuanVideoPipelineConfig, steps: Steps, frames: int, rows: int, columns: int
) -> Run:
    """As of any flow, see `flux.flow_run`, with one shift for all sizes; times are timesteps."""
    found = flow_run(config.scheduler, steps, frames * rows * columns // config.patch**2)
    times = found.schedule.times * np.float32(config.scheduler.num_train_timesteps)
    return found._replace(schedule=found.schedule._replace(times=times))


def shift(config: HunyuanVideoPipelineConfig, *size: int) -> float:
    """As in sampling: one for all sizes."""
    return math.log(config.scheduler.shift or 1.0)


def forward(
    module: HunyuanVideoTransformer,
    variables: Params,
    x: Float[Array, "b frames h w c"],
    t: Float[Array, " b"],
    conditioning: Conditioning,
    extras: Extras,
    *,
    apply: Apply = nn.Module.apply,
    **capture: Any,
) -> Any:
    """The velocity (noise - data) of latents at the timesteps `t`, 0 (clean) to 1000 (pure noise).

    `extras.channels`: of each place whether it is given, and what; None: nothing is. With
    `capture`, flax's `mutable` and `capture_intermediates`, the result is (velocity, state).
    """
    returned: Any = apply(
        module,
        variables,
        jnp.moveaxis(_seen(module, x, extras), -1, 1),
        t,
        conditioning.sequence,
        conditioning.mask,
        conditioning.vector,
        _guidance(module, extras),
        **capture,
    )
    if capture:
        return jnp.moveaxis(returned[0], 1, -1), returned[1]
    return jnp.moveaxis(returned, 1, -1)


def hoist(
    module: HunyuanVideoTransformer,
    variables: Params,
    times: Float[Array, "steps"],
    conditioning: Conditioning,
    extras: Extras,
    *,
    apply: Apply = nn.Module.apply,
) -> tuple[Each, Callable[[Array, Each], Array]]:
    """`forward` for the steps of a run: all modulations are computed in one pass over their
    weights. Text is refined in each step, as its timestep asks."""

    def method(name: str, *args: Any) -> Any:
        return apply(module, variables, *args, method=name)

    assert extras.positions is not None, "positions are those of `pack`"
    frames, rows, columns = size = extras.positions.shape[:3]
    states = jnp.asarray(conditioning.sequence).astype(module.dtype)
    batch, length = states.shape[:2]
    lengths = jnp.asarray(conditioning.mask).sum(axis=1).astype(jnp.int32)
    tokens = math.prod(size) // module.config.patch_size**2
    guidance = _guidance(module, extras)
    times = jnp.asarray(times)
    modulations = method("step_modulations", times, conditioning.vector, guidance)
    rope = method("positions", frames, rows, columns, length)
    replaced = method("replaced", frames, rows, columns)

    def step(x: Array, each: Each) -> Array:
        time, modulations = each
        text = method("embed_text", states, jnp.full(batch, time), lengths)
        seen = method("pack", jnp.moveaxis(_seen(module, x.astype(module.dtype), extras), -1, 1))
        marks = tokens + lengths, replaced
        out = method("denoise", seen, text, modulations, rope, *marks)
        return jnp.moveaxis(method("unpack", out, rows, columns), 1, -1)

    return (times, modulations), step


def _seen(module: HunyuanVideoTransformer, x: Array, extras: Extras) -> Array:
    """The state with the first frame that is given: in its place, or as more channels."""
    if extras.channels is None:
        return x
    mask, given = jnp.split(extras.channels.astype(x.dtype), [1], axis=-1)
    if module.config.image_condition_type == "token_replace":
        return jnp.where(mask > 0, given, x)
    return jnp.concatenate([x, given, mask], axis=-1)


def _guidance(module: HunyuanVideoTransformer, extras: Extras) -> Any:
    return extras.guidance if module.config.guidance_embeds else None


HUNYUAN_VIDEO = Family(
    tasks=TASKS,
    tasks_of=tasks_of,
    joined=joined,
    tokenize=tokenize,
    encode=encode,
    text_shapes=text_shapes,
    scale=FLUX.scale,
    networks=networks,
    state_shape=OPEN_SORA.state_shape,
    pack=OPEN_SORA.pack,
    unpack=OPEN_SORA.unpack,
    run=run,
    first_step=FLUX.first_step,
    started=FLUX.started,
    passes=FLUX.passes,
    forward=forward,
    hoist=hoist,
    path=lambda config: PATH,
    shift=shift,
)
