"""What a pipeline refuses, in words: options it does not have, and pictures that are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from fluxjax.config import ConfigError, PipelineConfig
from fluxjax.families.family import Conditioning, Family
from fluxjax.networks import network_of
from fluxjax.sample.picture_inputs import Inputs
from fluxjax.sample.settings import CLIP_FIELDS, FIELDS, GUIDED_FIELDS, Settings

# diffusers' names, for those who come from there.
OTHER_NAMES = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "true_cfg_scale": "true_cfg",
    "num_images_per_prompt": "number",
    "generator": "seed",
    "mask_image": "mask",
    "control_image": "control",
    "ip_adapter_image": "ip_image",
    "negative_ip_adapter_image": "negative_ip_image",
    "image_reference": "reference",
    "padding_mask_crop": "mask_crop",
    "skip_guidance_layers": "skip_layers",
    "skip_layer_guidance_scale": "skip_layer_scale",
    "skip_layer_guidance_start": "the start of skip_layer_range",
    "skip_layer_guidance_stop": "the end of skip_layer_range",
    "use_resolution_binning": "size_bins",
    "crops_coords_top_left": "crop (left, top)",
    "negative_crops_coords_top_left": "negative_crop (left, top)",
    "denoising_start": "refiner_start",
    "denoising_end": "refiner_start",
    "callback_on_step_end": "on_step",
    "output_type": "draw(settings), which gives bytes",
    "latents": "denoise(conditioning, noise)",
    "prompt_embeds": "denoise(conditioning, noise)",
    "num_frames": "frames",
    "sigmas": "denoise(conditioning, noise, steps=sigmas)",
}


def unknown_options(names: list[str]) -> str:
    """What to say of options that `__call__` does not have."""
    known = [f"{name} is called {OTHER_NAMES[name]} here" for name in names if name in OTHER_NAMES]
    rest = [repr(name) for name in names if name not in OTHER_NAMES]
    if rest:
        fields = ", ".join(f for f in FIELDS if f != "prompt" and not f.endswith("_sha256"))
        known.append(f"{', '.join(rest)} is no setting; there are {fields}")
    return "; ".join(known)


def check_clip(config: PipelineConfig, settings: Settings, usual: Settings) -> None:
    """Raises ConfigError for what other clips have and this model has not; `usual`: its own."""
    clips = config.tiling is not None
    if not clips:
        config.require_frames(settings.frames)
    for name in CLIP_FIELDS:
        if name in config.clip_settings or getattr(settings, name) == getattr(usual, name):
            continue
        if clips:
            raise ConfigError(f"{name} is Open-Sora's, and {config.class_name} has no such setting")
        raise ConfigError(f"{name} is for clips, and {config.class_name} draws pictures")


def check_told(
    family: Family,
    config: PipelineConfig,
    settings: Settings,
    usual: Settings,
    refiner: PipelineConfig | None = None,
    *,
    changed: bool,
) -> None:
    """Raises ConfigError for what neither the model nor its refiner is told of a picture, which
    would do nothing, and for prompts that cannot be cleaned; `usual`: the model's own settings,
    `changed`: whether it is an image drawn anew."""
    for negative in (False, True):
        told = settings.told(negative=negative, changed=changed)
        family.sizes(config, told)
        family.prompt_of("", told)
    scored = config.requires_aesthetics_score or (refiner or config).requires_aesthetics_score
    for name in ("aesthetic_score", "negative_aesthetic_score"):
        if not scored and getattr(settings, name) != getattr(usual, name):
            raise ConfigError(f"{name} is told to Stable Diffusion XL's refiner alone")
    if not settings.size_bins and not config.has_size_bins:
        raise ConfigError(
            f"size_bins are PixArt's: {config.class_name} draws in the size that is asked for"
        )
    if settings.prompt_2 is not None and len(config.text_encoders) < 2:
        raise ConfigError("prompt_2 is for a second text encoder, and this model has one")
    if settings.prompt_3 is not None:
        config.require_third_prompt()
    hears = not config.embeds_guidance or any(
        one.guidance_embeds for one in (*config.of(config.denoiser), *config.controlnets)
    )
    if not hears and settings.guidance not in (0, usual.guidance):
        raise ConfigError(
            "guidance is told to models that were distilled with it, and this one was not: it "
            "would do nothing"
        )


def check_guided(settings: Settings, scale: Any) -> None:
    """Raises ConfigError for what is of classifier-free guidance where there is none."""
    plain = Settings()
    for name in GUIDED_FIELDS:
        if scale is None and getattr(settings, name) != getattr(plain, name):
            raise ConfigError(
                f"{name} is of classifier-free guidance, which is off: it would do nothing"
            )


def require_finite(
    config: PipelineConfig,
    pictures: Array | np.ndarray,
    heard: Sequence[Conditioning | None],
    inputs: Inputs,
    latents: Array | np.ndarray,
) -> None:
    """ConfigError naming the first network on the pictures' way whose output is not finite."""
    if np.isfinite(np.asarray(pictures, np.float32)).all():
        return
    said = [one for one in heard if one is not None]
    seen = jax.tree.leaves(inputs._replace(image_prompts=None))
    looked = jax.tree.leaves(inputs.image_prompts)
    first, last = config.text_encoders[0], config.text_encoders[-1]
    outputs = {
        _named(config, first): [one.vector for one in said if one.vector is not None],
        _named(config, last): [one.sequence for one in said],
        "the autoencoder (vae), encoding a picture": seen,
        "the image encoder or the IP-Adapter": looked,
        f"the {config.denoiser}": [latents],
        "the autoencoder (vae)": [pictures],
    }
    guilty = next(
        name
        for name, arrays in outputs.items()
        if not all(np.isfinite(np.asarray(array, np.float32)).all() for array in arrays)
    )
    raise ConfigError(
        f"the picture has values that are not finite; {guilty} is the first network to give such "
        "values: its weights are damaged, or overflow in this dtype"
    )


def _named(config: PipelineConfig, component: str) -> str:
    return f"the {network_of(config.networks[component]).words} ({component})"
