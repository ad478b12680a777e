"""The tasks of FLUX.1: which pictures each of diffusers' pipeline classes takes, and how.

Sources: diffusers `pipelines/flux`; BFL's tools follow with `rounding="bfl"`.
"""

from __future__ import annotations

import numpy as np
from einops import rearrange
from jaxtyping import Float

from fluxjax.config import FluxPipelineConfig
from fluxjax.families.family import Task

_IMAGE, _MASKED = frozenset({"image"}), frozenset({"image", "mask"})

TASKS: dict[str, Task] = {
    "FluxPipeline": Task(),
    "FluxKontextPipeline": Task(pictures=frozenset({"reference"})),
    "FluxImg2ImgPipeline": Task(pictures=_IMAGE, draws=("image", "noise"), strength=0.6),
    "FluxInpaintPipeline": Task(
        pictures=_MASKED, draws=("image", "noise"), keeps=True, strength=0.85
    ),
    "FluxKontextInpaintPipeline": Task(pictures=_MASKED | {"reference"}, keeps=True, strength=1.0),
    "FluxFillPipeline": Task(
        pictures=_MASKED,
        draws=("image", "noise", "masked"),
        channels=("masked", "mask"),
        strength=1.0,
        bfl_text=128,
    ),
    "FluxControlPipeline": Task(
        pictures=frozenset({"control"}), draws=("control", "noise"), channels=("control",)
    ),
    "FluxControlImg2ImgPipeline": Task(
        pictures=_IMAGE | {"control"},
        draws=("control", "image", "noise"),
        channels=("control",),
        strength=0.6,
    ),
    # diffusers encodes the masked image first and makes no use of it but of the noise it took.
    "FluxControlInpaintPipeline": Task(
        pictures=_MASKED | {"control"},
        draws=("masked", "control", "image", "noise"),
        channels=("control",),
        keeps=True,
        strength=0.85,
    ),
}


def joined(config: FluxPipelineConfig) -> int:
    """Channels that the transformer reads besides those of its latents, as many as all pixels of a
    latent have in a mask."""
    return config.transformer.in_channels // 4 - config.vae.latent_channels


def tasks_of(config: FluxPipelineConfig) -> list[Task]:
    """Those whose channels a model's transformer reads."""
    latent, mask = config.vae.latent_channels, config.vae.scale**2
    size = {"control": latent, "masked": latent, "mask": mask}
    return [
        task
        for task in TASKS.values()
        if sum(map(size.__getitem__, task.channels)) == joined(config)
    ]


def mask_channels(
    mask: Float[np.ndarray, "n height width"], config: FluxPipelineConfig
) -> Float[np.ndarray, "n c rows columns"]:
    """The pixels of a mask as channels of the latents under them (FLUX.1 Fill)."""
    scale = config.vae.scale
    return rearrange(mask, "n (h y) (w x) -> n (y x) h w", y=scale, x=scale)
