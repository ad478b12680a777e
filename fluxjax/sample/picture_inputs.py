"""From the pictures of a run to what its network is given: latents, masks and channels.

Source: diffusers' pipelines of `fluxjax.families.flux_tasks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from fluxjax.config import CONTROLS, ConfigError
from fluxjax.families.family import AnyArray, Conditioning, Task
from fluxjax.models.autoencoder import normalize_latents
from fluxjax.sample.controls import ControlInput, control_inputs, control_pictures
from fluxjax.sample.denoise import Kept
from fluxjax.sample.given_pictures import Given
from fluxjax.sample.ip_adapter import ImagePrompts
from fluxjax.sample.masks import (
    Box,
    crop_box,
    cropped,
    mask_values,
    painted_latents,
    pasted,
)
from fluxjax.sample.reference import pixels
from fluxjax.schedules.schedule import Schedule
from fluxjax.schedules.step_table import Run

if TYPE_CHECKING:
    from fluxjax.sample.settings import Settings
    from fluxjax.sample.stages import Stages

Latents = Float[AnyArray, "_ c *size"]


class Inputs(NamedTuple):
    """What `Pipeline.denoise` is given besides text and noise: a row for each picture, or one for
    all."""

    reference: Float[AnyArray, "_ c _ _"] | None = None
    """Latents of a picture to edit."""
    channels: Float[AnyArray, "_ more *size"] | None = None
    """What is joined to the state's channels (FLUX.1 Fill and Control, given frames of a clip)."""
    image: Latents | None = None
    """Where image to image starts."""
    mask: Float[AnyArray, "_ 1 *size"] | None = None
    """At 0 `kept` is put back after each step."""
    kept: Latents | None = None
    controls: tuple[ControlInput, ...] = ()
    """Of each ControlNet."""
    image_prompts: ImagePrompts | None = None
    """Of an IP-Adapter."""

    def of_passes(self, many: int) -> tuple[Float[AnyArray, "_ more *size"], ...] | None:
        """`channels` of each pass: of three, as Open-Sora's guidance has them, the last one sees
        none."""
        if self.channels is None:
            return None
        return (self.channels,) * min(many, 2) + (np.zeros_like(self.channels),) * (many - 2)


NOTHING = Inputs()


def box_of(given: Given, settings: Settings) -> Box | None:
    """Where the image is cropped, with `mask_crop`."""
    if settings.mask_crop is None or given.mask is None:
        return None
    return crop_box(given.mask, settings.width, settings.height, settings.mask_crop)


def make_inputs(
    pipe: Stages,
    task: Task,
    given: Given,
    settings: Settings,
    draws: Mapping[str, Float[np.ndarray, "_ c *size"]],
) -> Inputs:
    """`draws`: the noise of the task; BFL's rounding encodes by the posterior's mean."""
    size, box = (settings.width, settings.height), box_of(given, settings)
    seen: dict[str, Float[np.ndarray, "1 height width 3"]] = {}
    seen |= control_pictures(pipe.config, given, settings)
    if given.image is not None:
        whole = given.image if box is None else cropped(given.image, box, *size)
        seen["image"] = pixels(whole, *size)
    values = None
    if given.mask is not None:
        whole = given.mask if box is None else cropped(given.mask, box, *size)
        soft = settings.soft_mask or (settings.rounding == "bfl" and task.reads_mask)
        values = mask_values(whole, *size, soft=soft)
        seen["masked"] = seen["image"] * (1 - values[..., None])

    def encoded(name: str, *, drawn: bool = True) -> Float[np.ndarray, "_ c *size"]:
        if draws.keys().isdisjoint(seen) or settings.rounding == "bfl":
            return pipe.encode_pictures(seen[name])
        mean, deviation = pipe.encode_posterior(seen[name])
        if drawn:
            mean = mean + deviation * draws[name].astype(mean.dtype)
        return np.asarray(normalize_latents(mean, pipe.config.vae))

    def channel(name: str) -> Float[np.ndarray, "_ c *size"]:
        return pipe.family.mask_channels(values, pipe.config) if name == "mask" else encoded(name)

    channels = [channel(name) for name in task.channels]
    rows = max((len(one) for one in channels), default=1)
    joined = [np.repeat(one, rows, axis=0) if len(one) < rows else one for one in channels]
    scale, nets = pipe.config.vae.scale, pipe.config.controlnets
    starts = task.starts_from(settings.strength)
    image = encoded("image") if starts or (task.keeps and not task.reads_mask) else None
    kept = mask = None
    if task.keeps and values is not None:
        kept, mask = image, values[:, None, ::scale, ::scale]
        if task.reads_mask:
            kept = encoded("image", drawn=False)
            mask = painted_latents(values if settings.soft_mask else np.round(values), scale)
    controls = [
        (seen[name] if net.sees_pixels else encoded(name)).astype(pipe.dtype)
        for name, net in zip(CONTROLS, nets, strict=False)
    ]
    return Inputs(
        _reference(pipe, given, box),
        np.concatenate([one.astype(pipe.dtype) for one in joined], axis=1) if joined else None,
        image if starts else None,
        mask,
        kept,
        control_inputs(pipe.config, settings, pipe.control_scales, controls),
    )


def _reference(pipe: Stages, given: Given, box: Box | None) -> Float[AnyArray, "1 c _ _"] | None:
    """Latents of the picture to edit; where a part of it is drawn, of that part."""
    picture = given.reference
    if picture is None or box is None or given.image is not picture:
        return None if picture is None else pipe.encode_reference(picture)
    size = pipe.reference_size(picture)
    return pipe.encode_pictures(pixels(cropped(picture, box, *size), *size))


def kept(inputs: Inputs, noise: Latents) -> Kept | None:
    """What inpainting puts back, with a row for each picture."""
    if inputs.mask is None:
        return None
    assert inputs.kept is not None, "what is kept is an image's"
    count, dtype = len(noise), noise.dtype
    mask = np.broadcast_to(inputs.mask, (count, *inputs.mask.shape[1:])).astype(np.float32)
    return Kept(mask, np.broadcast_to(inputs.kept, noise.shape).astype(dtype), noise)


def rows_of_pictures(
    conditionings: tuple[Conditioning | None, ...],
    guidance: float,
    inputs: Inputs,
    noise: Latents,
) -> tuple[Any, ...]:
    """Of each pass what it hears -> what `Drawn` has a row of for each picture, in its order."""
    count, prompts = len(noise), inputs.image_prompts

    def for_each(one: AnyArray | None) -> AnyArray | None:
        return None if one is None else np.broadcast_to(one, (count, *one.shape[1:]))

    channels = inputs.of_passes(len(conditionings))
    return (
        conditionings,
        np.full(count, guidance, np.float32),
        for_each(inputs.reference),
        channels and tuple(map(for_each, channels)),
        kept(inputs, noise),
        tuple(one.rows(count) for one in inputs.controls),
        () if prompts is None else prompts.rows(count),
    )


def noise_of_steps(
    run: Run, schedule: Schedule, noise: Latents, added: Mapping[str, Latents]
) -> Float[np.ndarray, "n steps c *size"] | None:
    """What the steps of the padded schedule add, of `Stages.draw_each`; None where none may.

    Zeros where this sampler draws nothing, so that all samplers share a program. Raises ConfigError
    where a draw is missing.
    """
    if schedule.matrices is None:
        return None
    found = np.zeros((len(noise), len(schedule.times), *noise.shape[1:]), noise.dtype)
    for i in np.flatnonzero(run.draws):
        if f"step {i}" not in added:
            raise ConfigError("this sampler draws noise on its way: give `added`, of `draw_each`")
        found[:, i] = added[f"step {i}"]
    return found


def finished(
    pictures: UInt8[np.ndarray, "n height width 3"], given: Given, settings: Settings
) -> UInt8[np.ndarray, "n _ _ 3"]:
    """With `mask_crop` the images that the crops are drawn into."""
    from PIL.Image import fromarray

    if (box := box_of(given, settings)) is None:
        return pictures
    assert given.image is not None and given.mask is not None
    return np.stack(
        [np.asarray(pasted(fromarray(one), given.image, given.mask, box)) for one in pictures]
    )
