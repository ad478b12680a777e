"""PixArt-alpha and PixArt-Sigma: T5, and a transformer over latents that predicts their noise.

Source: diffusers `PixArtAlphaPipeline`, `PixArtSigmaPipeline`; Chen et al. 2023 and 2024.
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

from fluxjax.config import ConfigError, PipelineConfig, PixArtAlphaPipelineConfig
from fluxjax.families.family import (
    AnyArray,
    Apply,
    Conditioning,
    Extras,
    Task,
    Told,
    hear_anew,
    no_sizes,
)
from fluxjax.families.noise_path import DiffusionPath
from fluxjax.families.stable_diffusion import STABLE_DIFFUSION
from fluxjax.models import lora
from fluxjax.models.pixart import Modulations, PixArtTransformer
from fluxjax.models.t5 import T5Encoder
from fluxjax.networks import network_of
from fluxjax.shapes import Params
from fluxjax.text.clean_caption import clean_caption
from fluxjax.text.cut_prompts import left_out

if TYPE_CHECKING:
    from fluxjax.text.tokenizers import PromptTokenizer

TASKS = {"PixArtAlphaPipeline": Task(), "PixArtSigmaPipeline": Task()}


class PromptIds(NamedTuple):
    """Token ids of a batch of prompts; `mask` is 1 where they are not padding."""

    ids: Int[AnyArray, "b text"]
    mask: Int[AnyArray, "b text"]


def tasks_of(config: PipelineConfig) -> list[Task]:
    """The one of its class in model_index.json."""
    return [TASKS[config.class_name]]


def tokenize(
    tokenizers: Sequence[PromptTokenizer],
    prompts: Sequence[str],
    prompts_2: Sequence[str] | None = None,
    *,
    max_sequence_length: int,
) -> tuple[PromptIds, list[str]]:
    """Token ids of the prompts in small letters, and one line for each whose end is not read."""
    if prompts_2 is not None:
        raise ConfigError("prompt_2 is for a second text encoder, and this model has one")
    (t5,) = tokenizers
    read = t5([prompt.lower().strip() for prompt in prompts], max_sequence_length)
    return PromptIds(read.input_ids, read.attention_mask), left_out(
        read.removed, max_sequence_length
    )


def prompt_of(prompt: str, told: Told) -> str:
    """The prompt, cleaned where that is asked for."""
    return clean_caption(prompt) if told.clean else prompt


@partial(jax.jit, static_argnames=("encoders", "apply"))
def encode(
    encoders: tuple[T5Encoder],
    params: tuple[Params],
    ids: PromptIds,
    *,
    apply: Apply = nn.Module.apply,
) -> Conditioning:
    """T5's states, which hear nothing of the padding; neither does the transformer."""
    (t5,), (weights,) = encoders, params
    states = jnp.asarray(apply(t5, lora.variables(weights), ids.ids, ids.mask))
    return Conditioning(states, jnp.asarray(ids.mask), None)


def text_shapes(
    config: PixArtAlphaPipelineConfig, count: int, length: int, dtype: Any
) -> tuple[PromptIds, Conditioning]:
    """Shapes of what `tokenize` and `encode` make of `count` prompts, with their sizes."""
    spec: Any = jax.ShapeDtypeStruct
    ids = spec((count, length), jnp.int32)
    sequence = spec((count, length, config.text_encoder.d_model), dtype)
    told = config.transformer.use_additional_conditions
    sizes = spec((count, 3), jnp.float32) if told else None
    return PromptIds(ids, ids), Conditioning(sequence, ids, None, sizes)


def sizes(config: PixArtAlphaPipelineConfig, told: Told) -> Float[np.ndarray, " 3"] | None:
    """Height, width and the one by the other, where the transformer is told them."""
    no_sizes(config, told)
    if not config.transformer.use_additional_conditions:
        return None
    width, height = told.size
    return np.array([height, width, height / width], np.float32)


def networks(
    config: PixArtAlphaPipelineConfig, rounding: str, **fields: Any
) -> tuple[PixArtTransformer, tuple[()]]:
    """The one that draws; timesteps are numbers of the schedule in everybody's rounding."""
    return network_of(config.transformer).build(config.transformer, **fields), ()


def _told(
    module: PixArtTransformer, conditioning: Conditioning
) -> tuple[Float[Array, "b 2"], Float[Array, "b 1"]] | tuple[None, None]:
    """Sizes and their ratio; in the module's dtype, as diffusers rounds them."""
    if conditioning.sizes is None:
        return None, None
    rounded = jnp.asarray(conditioning.sizes).astype(module.dtype)
    return rounded[:, :2], rounded[:, 2:]


def forward(
    module: PixArtTransformer,
    variables: Params,
    x: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    conditioning: Conditioning,
    extras: Extras,
    *,
    apply: Apply = nn.Module.apply,
    **capture: Any,
) -> Any:
    """The noise of latents at the timesteps `t`, 0 (clean) to 999, and in the second half of the
    channels the learned variance.

    With `capture`, flax's `mutable` and `capture_intermediates`, the result is (output, state).
    """
    heard = conditioning.sequence, t, conditioning.mask, *_told(module, conditioning)
    return apply(module, variables, x, *heard, **capture)


def hoist(
    module: PixArtTransformer,
    variables: Params,
    times: Float[Array, "steps"],
    conditioning: Conditioning,
    extras: Extras,
    *,
    apply: Apply = nn.Module.apply,
) -> tuple[Modulations, Callable[[Array, Modulations], Array]]:
    """`forward` for the steps of a run: text and all modulations are computed once."""

    def method(name: str, *args: Any) -> Any:
        return apply(module, variables, *args, method=name)

    states = jnp.asarray(conditioning.sequence)
    text = method("embed_text", states.astype(module.dtype))
    told, mask = _told(module, conditioning), conditioning.mask
    lengths = None if mask is None else jnp.asarray(mask).sum(axis=1)
    each = method("step_modulations", jnp.asarray(times), len(states), *told)

    def step(x: Array, each: Modulations) -> Array:
        size = x.shape[1:3]
        patches = method("patchify", x.astype(module.dtype))
        positions = method("positions", *size)
        out = method("denoise", patches, positions, text, each, lengths)
        return method("unpatchify", out, *size)

    return each, step


def path(config: PixArtAlphaPipelineConfig) -> DiffusionPath:
    """Noise, and where the transformer has the channels for it the variance of each step."""
    sizes = config.transformer.out_channels, config.transformer.in_channels
    return replace(DiffusionPath.of(config.scheduler), learns_variance=sizes[0] == 2 * sizes[1])


PIXART = replace(
    STABLE_DIFFUSION,
    tasks=TASKS,
    tasks_of=tasks_of,
    tokenize=tokenize,
    encode=encode,
    encode_anew=partial(hear_anew, encode),
    text_shapes=text_shapes,
    sizes=sizes,
    networks=networks,
    prompt_of=prompt_of,
    forward=forward,
    hoist=hoist,
    path=path,
)
