"""The tasks of FLUX.1: which pictures each of diffusers' pipeline classes takes, and how.

Sources: diffusers `pipelines/flux`; BFL's tools follow with `rounding="bfl"`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from einops import rearrange
from jaxtyping import Float

from fluxjax.config import CONTROLS, FluxPipelineConfig
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
    "FluxControlNetPipeline": Task(pictures=frozenset({"control"}), draws=("control", "noise")),
    "FluxControlNetImg2ImgPipeline": Task(
        pictures=_IMAGE | {"control"}, draws=("control", "image", "noise"), strength=0.6
    ),
    "FluxControlNetInpaintPipeline": Task(
        pictures=_MASKED | {"control"},
        draws=("control", "image", "noise"),
        keeps=True,
        strength=0.85,
    ),
}


def in_channels(task: Task, config: FluxPipelineConfig) -> int:
    """Of a transformer for the task: a token of 2 x 2 latents, and what is joined to it."""
    latent, mask = config.vae.latent_channels, config.vae.scale**2
    size = {"control": latent, "masked": latent, "mask": mask}
    return 4 * (latent + sum(size[name] for name in task.channels))


def joined(config: FluxPipelineConfig) -> int:
    """Channels that the transformer reads besides those of its latents, as many as all pixels of a
    latent have in a mask."""
    return config.transformer.in_channels // 4 - config.vae.latent_channels


def tasks_of(config: FluxPipelineConfig) -> list[Task]:
    """Those whose channels a model's transformer reads, and for which it has a ControlNet."""
    found = []
    for name, task in TASKS.items():
        if in_channels(task, config) != config.transformer.in_channels:
            continue
        if ("ControlNet" in name) == bool(config.controlnets):
            found.append(_with_controls(task, config) if config.controlnets else task)
    return found


def _with_controls(task: Task, config: FluxPipelineConfig) -> Task:
    """With a draw for each control picture that the autoencoder encodes."""
    encoded = [i for i, net in enumerate(config.controlnets) if not net.sees_pixels]
    controls = tuple(CONTROLS[i] for i in encoded)
    draws = [controls if draw == "control" else (draw,) for draw in task.draws]
    return replace(task, draws=tuple(draw for group in draws for draw in group))


def widened(config: FluxPipelineConfig, given: Iterable[str]) -> FluxPipelineConfig:
    """What a text-to-image model becomes that learns to draw from these pictures: one that reads
    them as channels, if it does not draw from them already or sees them as tokens."""
    pictures = frozenset(given)
    joined = [t for t in TASKS.values() if t.pictures == pictures and t.channels]
    if not joined or config.transformer.in_channels != in_channels(Task(), config):
        return config
    inputs = in_channels(joined[0], config)
    return replace(config, transformer=replace(config.transformer, in_channels=inputs))


def mask_channels(
    mask: Float[np.ndarray, "n height width"], config: FluxPipelineConfig
) -> Float[np.ndarray, "n c rows columns"]:
    """The pixels of a mask as channels of the latents under them (FLUX.1 Fill)."""
    scale = config.vae.scale
    return rearrange(mask, "n (h y) (w x) -> n (y x) h w", y=scale, x=scale)
