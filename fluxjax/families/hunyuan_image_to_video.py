"""HunyuanVideo from a first frame, which its language model sees too.

Source: diffusers `HunyuanVideoImageToVideoPipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fluxjax.config import ConfigError, HunyuanVideoImageToVideoPipelineConfig
from fluxjax.config.hunyuan_video_pipeline import PICTURE_SIDE
from fluxjax.families.clip_pixels import clip_pixels
from fluxjax.families.family import (
    AnyArray,
    Apply,
    Conditioning,
    Task,
    second_prompts,
)
from fluxjax.families.hunyuan_video import HUNYUAN_VIDEO
from fluxjax.models import lora
from fluxjax.models.clip import CLIPTextModel
from fluxjax.models.hunyuan_video import HunyuanVideoTransformer
from fluxjax.models.llava import LlavaModel
from fluxjax.schedules.step_table import Run
from fluxjax.shapes import Params
from fluxjax.text.cut_prompts import left_out
from fluxjax.text.prompt_template import FROM_PICTURE, templated

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from fluxjax.text.tokenizers import PromptTokenizer

TASKS = {
    "HunyuanVideoImageToVideoPipeline": Task(
        pictures=frozenset({"reference"}),
        channels=("given",),
        heard=True,
        stretched=True,
        begins=True,
    )
}
PLACE = 5
"""Of the picture's token in the template."""
_PICTURE, _ENDS = "<image>", "<|end_header_id|>"
_LEFT_OUT = 4
"""Tokens before the answer, from the end of the prompt on, which are not heard."""
_NOISE = np.float32(0.999)
"""Of what a run starts from; the rest is the first frame."""


class PromptIds(NamedTuple):
    """Token ids of a batch of prompts: of the language model those of its whole template, with one
    token for the picture; `heard` are the places of those whose states are kept."""

    llama: Int[AnyArray, "b whole"]
    mask: Int[AnyArray, "b whole"]
    heard: Int[AnyArray, "b kept"]
    pixels: Float[AnyArray, "b side side 3"]
    clip: Int[AnyArray, "b l"]


def tasks_of(config: HunyuanVideoImageToVideoPipelineConfig) -> list[Task]:
    """The one of its class in model_index.json."""
    return [TASKS[config.class_name]]


def tokenize(
    tokenizers: Sequence[PromptTokenizer],
    prompts: Sequence[str],
    prompts_2: Sequence[str] | None = None,
    *,
    max_sequence_length: int,
    picture: Picture | None = None,
) -> tuple[PromptIds, list[str]]:
    """As of text to video; all prompts see the same picture, black where there is none."""
    from PIL import Image

    second = second_prompts(prompts, prompts_2, empty=True)
    if max_sequence_length <= _LEFT_OUT:
        raise ConfigError(
            f"max_sequence_length must be above {_LEFT_OUT} where a picture is read, got "
            f"{max_sequence_length}"
        )
    llama, clip = tokenizers
    read = templated(llama, prompts, FROM_PICTURE, max_sequence_length=max_sequence_length)
    token = llama.backend.token_to_id
    if (read.input_ids[:, PLACE] != token(_PICTURE)).any():
        raise ConfigError(
            f"{llama.where} is another model's: {_PICTURE} is to be its token {PLACE} of "
            "HunyuanVideo's words around a prompt"
        )
    heard = np.stack([_heard(ids == token(_ENDS), llama.where) for ids in read.input_ids])
    seen = clip_pixels(picture or Image.new("RGB", (PICTURE_SIDE, PICTURE_SIDE)), PICTURE_SIDE)
    pixels = np.broadcast_to(seen, (len(prompts), *seen.shape))
    ids = PromptIds(read.input_ids, read.attention_mask, heard, pixels, clip(second).input_ids)
    return ids, left_out(read.removed, max_sequence_length)


def _heard(ends: np.ndarray, where: str) -> Int[np.ndarray, " kept"]:
    """Places of the prompt and of what follows it, but for the words before the answer; of a prompt
    whose end is cut off, all but so many. `ends`: where a speaker's name ends."""
    last = np.flatnonzero(ends)
    # The system's, the user's, and the assistant's, which may be cut off.
    stop = last[2] + 1 if len(last) > 2 else len(ends)
    if stop - _LEFT_OUT < FROM_PICTURE.crop:
        raise ConfigError(
            f"{where} is another model's: HunyuanVideo's words before a prompt are "
            f"{FROM_PICTURE.crop} tokens of the model's own"
        )
    places = np.arange(FROM_PICTURE.crop, len(ends), dtype=np.int32)
    return places[(places < stop - _LEFT_OUT) | (places >= stop)]


@partial(jax.jit, static_argnames=("encoders", "apply"))
def encode(
    encoders: tuple[LlavaModel, CLIPTextModel],
    params: tuple[Params, Params],
    ids: PromptIds,
    *,
    apply: Apply = nn.Module.apply,
) -> Conditioning:
    """The language model's states, of the picture and of the prompt, and CLIP's pooled state."""
    (llava, clip), (llava_params, clip_params) = encoders, params
    given = ids.llama, ids.mask, ids.pixels, PLACE
    states = jnp.asarray(apply(llava, lora.variables(llava_params), *given))
    tokens = llava.config.picture_tokens
    picture = states[:, PLACE : PLACE + tokens : llava.config.heard_stride]
    heard = jnp.asarray(ids.heard)
    text = jnp.take_along_axis(states, heard[..., None] + tokens - 1, axis=1)
    mask = jnp.take_along_axis(jnp.asarray(ids.mask), heard, axis=1)
    mask = jnp.concatenate([jnp.ones(picture.shape[:2], mask.dtype), mask], axis=1)
    pooled: Any = apply(clip, lora.variables(clip_params), ids.clip)
    return Conditioning(jnp.concatenate([picture, text], axis=1), mask, pooled.pooler_output)


def text_shapes(
    config: HunyuanVideoImageToVideoPipelineConfig, count: int, length: int, dtype: Any
) -> tuple[PromptIds, Conditioning]:
    """Shapes of what `tokenize` and `encode` make of `count` prompts."""
    spec: Any = jax.ShapeDtypeStruct
    whole = spec((count, FROM_PICTURE.crop + length), jnp.int32)
    heard = spec((count, length - _LEFT_OUT), jnp.int32)
    pixels = spec((count, PICTURE_SIDE, PICTURE_SIDE, 3), jnp.float32)
    clip = spec((count, config.text_encoder_2.max_position_embeddings), jnp.int32)
    llava = config.text_encoder
    tokens = -(-llava.picture_tokens // llava.heard_stride) + length - _LEFT_OUT
    sequence = spec((count, tokens, llava.hidden_size), dtype)
    vector = spec((count, config.text_encoder_2.hidden_size), dtype)
    mask = spec((count, tokens), jnp.int32)
    return PromptIds(whole, whole, heard, pixels, clip), Conditioning(sequence, mask, vector)


def begun(
    image: Float[np.ndarray, "n c #frames h w"], noise: Float[np.ndarray, "n c frames h w"]
) -> Float[np.ndarray, "n c frames h w"]:
    """The latents before the first step: noise, and a little of the first frame in every frame."""
    return np.asarray(noise * _NOISE + image * (np.float32(1) - _NOISE))


def started(
    image: Float[np.ndarray, "n c frames h w"], noise: Float[np.ndarray, "n c frames h w"], run: Run
) -> Float[np.ndarray, "n c frames h w"]:
    """Noise with a share of the first frame's latents, see `begun`."""
    return begun(image, noise)


def counted(
    module: HunyuanVideoTransformer, channels: Float[Array, "b frames h w more"]
) -> Float[Array, "b #frames #h #w 1"]:
    """A first frame that takes the state's place is no error of the network's: the mean is that of
    the other frames. Source: Tencent's HunyuanVideo-I2V `hyvideo/diffusion/flow/transport.py`."""
    if module.config.image_condition_type != "token_replace":
        return jnp.ones((len(channels), 1, 1, 1, 1))
    new = 1.0 - channels[..., :1]
    return new / new.mean(axis=(1, 2, 3, 4), keepdims=True)


HUNYUAN_IMAGE_TO_VIDEO = replace(
    HUNYUAN_VIDEO,
    tasks=TASKS,
    tasks_of=tasks_of,
    tokenize=tokenize,
    encode=encode,
    text_shapes=text_shapes,
    started=started,
    counted=counted,
)
