"""Stable Diffusion XL, base and refiner: one or two CLIPs, and a UNet that is told sizes.

Source: diffusers `StableDiffusionXLPipeline`, `StableDiffusionXLImg2ImgPipeline`,
`StableDiffusionXLInpaintPipeline`; Podell et al. 2023.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fluxjax.config import ConfigError, StableDiffusionXLConfig
from fluxjax.families.family import Apply, Conditioning, Told, hear_anew
from fluxjax.families.stable_diffusion import STABLE_DIFFUSION, PromptIds, tasks, tasks_of
from fluxjax.families.stable_diffusion import text_shapes as of_states
from fluxjax.models import lora
from fluxjax.models.clip import CLIPTextModel
from fluxjax.shapes import Params

TASKS = tasks("StableDiffusionXL", image=0.3, inpaint=0.9999)


@partial(jax.jit, static_argnames=("encoders", "apply"))
def encode(
    encoders: tuple[CLIPTextModel, ...],
    params: tuple[Params, ...],
    ids: PromptIds,
    *,
    apply: Apply = nn.Module.apply,
) -> Conditioning:
    """Side by side the encoders' states before their last layer, or an earlier one, not normed; and
    the pooled projection of the last encoder."""
    outputs = read_clips(encoders, params, ids, apply)
    states = [output.penultimate_hidden_state for output in outputs]
    return Conditioning(jnp.concatenate(states, axis=-1), None, outputs[-1].text_embeds)


def read_clips(
    encoders: tuple[CLIPTextModel, ...], params: tuple[Params, ...], ids: PromptIds, apply: Apply
) -> list[Any]:
    """What each one gives, with the states before its last layer or an earlier one."""
    outputs = []
    for clip, weights, tokens in zip(encoders, params, ids.ids[: len(encoders)], strict=True):
        layer = clip.config.num_hidden_layers - 1 - ids.skipped
        outputs.append(apply(clip, lora.variables(weights), tokens, layer))
    return outputs


def text_shapes(
    config: StableDiffusionXLConfig, count: int, length: int, dtype: Any
) -> tuple[PromptIds, Conditioning]:
    """Shapes of what `tokenize` and `encode` make of `count` prompts, with their sizes."""
    spec: Any = jax.ShapeDtypeStruct
    ids, heard = of_states(config, count, length, dtype)
    pooled = config.networks[config.text_encoders[-1]].projection_dim
    sizes = spec((count, config.size_numbers), jnp.float32)
    return ids, heard._replace(vector=spec((count, pooled), dtype), sizes=sizes)


def sizes(config: StableDiffusionXLConfig, told: Told) -> Float[np.ndarray, " numbers"]:
    """Height and width of the original, top and left of its crop, and then height and width of the
    target or, for the refiner, the aesthetic score.

    Raises ConfigError for a refiner's target, and for sizes of the negative prompt that diffusers
    does not hear.
    """
    for name in ("target_size", "negative_target_size"):
        if config.requires_aesthetics_score and getattr(told, name) is not None:
            raise ConfigError(
                f"{name} is told to XL's base model; its refiner hears aesthetic_score"
            )
    original, crop, target = told.original_size, told.crop, told.target_size
    if told.negative:
        original, crop, target = _negative_sizes(config, told)
    width, height = original or told.size
    left, top = crop or (0, 0)
    wide, high = target or told.size
    last = (told.aesthetic_score,) if config.requires_aesthetics_score else (high, wide)
    return np.array([height, width, top, left, *last], np.float32)


def _negative_sizes(config: StableDiffusionXLConfig, told: Told) -> tuple[Any, Any, Any]:
    """Each of diffusers' three pipelines has another way with them."""
    original, crop = told.negative_original_size, told.negative_crop
    target = told.negative_target_size
    if config.requires_aesthetics_score:
        return original or told.original_size, crop, None
    if told.changed:
        if crop is not None:
            raise ConfigError(
                "negative_crop is not heard where an image is drawn anew: there the negative "
                "prompt has the prompt's crop"
            )
        return original or told.original_size, told.crop, target or told.target_size
    if original is not None and target is not None:
        return original, crop, target
    if (original, crop, target) != (None, None, None):
        raise ConfigError(
            "of what the negative prompt describes negative_original_size and "
            "negative_target_size are told together, and negative_crop only beside them"
        )
    return told.original_size, told.crop, told.target_size


STABLE_DIFFUSION_XL = replace(
    STABLE_DIFFUSION,
    tasks=TASKS,
    tasks_of=partial(tasks_of, TASKS),
    encode=encode,
    encode_anew=partial(hear_anew, encode),
    text_shapes=text_shapes,
    sizes=sizes,
)
