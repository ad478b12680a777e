"""What a pipeline refuses, in words: options it does not have, and pictures that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array

from fluxjax.config import ConfigError, PipelineConfig
from fluxjax.families.family import Conditioning, Family
from fluxjax.networks import network_of
from fluxjax.sample.picture_inputs import Inputs
from fluxjax.sample.settings import CLIP_FIELDS, FIELDS, Settings

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
    family: Family, config: PipelineConfig, settings: Settings, *, changed: bool
) -> None:
    """Raises ConfigError for what the family is not told of a picture, and for prompts that cannot
    be cleaned. `changed`: whether it is an image drawn anew."""
    for negative in (False, True):
        told = settings.told(negative=negative, changed=changed)
        family.sizes(config, told)
        family.prompt_of("", told)


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
