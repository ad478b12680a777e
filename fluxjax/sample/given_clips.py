"""Frames that a clip is given, its first or last picture or part of another clip: read, fitted to
its size, encoded, and put back when it is drawn.

Source: hpcaitech/Open-Sora `opensora/utils/inference.py`, `opensora/datasets/utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from fluxjax.config import ConfigError, PipelineConfig
from fluxjax.config.video_sizes import AREAS, video_sizes
from fluxjax.families.family import AnyArray, Task
from fluxjax.models.video_condition import (
    GivenFrames,
    given_frames,
    given_lengths,
    least_frames,
    put_back,
)
from fluxjax.sample.given_pictures import Given
from fluxjax.sample.picture_inputs import NOTHING, Inputs
from fluxjax.sample.reference import pixels

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from fluxjax.sample.settings import Settings
    from fluxjax.sample.stages import Stages

_NAMED = {
    "i2v_head": "a first frame needs",
    "i2v_tail": "a last frame needs",
    "i2v_loop": "a first and a last frame need",
}
_PICTURES = {
    frozenset({"reference"}): "i2v_head",
    frozenset({"last"}): "i2v_tail",
    frozenset({"reference", "last"}): "i2v_loop",
}


def condition_of(given: Given, settings: Settings) -> str | None:
    """The `VideoCondition` of what is given; None where nothing is."""
    if given.video is not None:
        return settings.video_kind
    return _PICTURES.get(given.names)


def check_given(config: Any, given: Given, settings: Settings) -> None:
    """Raises ConfigError for a clip that is too short, the given or the new one, and for guidance
    by frames that are not given."""
    kind = condition_of(given, settings)
    if kind is None:
        if settings.image_guidance != getattr(config, "image_guidance", settings.image_guidance):
            raise ConfigError(
                "image_guidance is by the frames that a clip is given: give a reference, a last "
                "frame or a video"
            )
        return
    least = config.frames_of(least_frames(kind))
    if settings.frames < least:
        needs = _NAMED.get(kind, f"{kind} needs")
        raise ConfigError(
            f"{needs} a clip of at least {least} frames around it, not {settings.frames}"
        )
    if given.video is not None:
        count, there = config.frames_of(max(given_lengths(kind))), len(given.video.frames)
        if there < count:
            raise ConfigError(
                f"the given video has {there} frame{'s' * (there != 1)}, and {kind} takes "
                f"{count} of them"
            )


def clip_inputs(
    stages: Stages, task: Task, given: Given, settings: Settings, draws: Mapping[str, AnyArray]
) -> Inputs:
    """What the network sees of the given frames; `draws` has the noise of their posterior, of whose
    means they are where it has none."""
    kind = condition_of(given, settings)
    if kind is None:
        return NOTHING
    shape = (1, *draws["noise"].shape[1:])
    size, config = (settings.width, settings.height), stages.config
    ends = dict.fromkeys(("head", "tail"))
    for end, length, picture, noise in zip(
        ends, given_lengths(kind), (given.reference, given.last), ("reference", "last"), strict=True
    ):
        if not length:
            continue
        if picture is not None:
            frames = (
                pixels(picture, *size)[None] if task.stretched else picture_frame(picture, *size)
            )
            noise = draws.get(noise)
        else:
            assert given.video is not None, "what is not given as pictures is a video"
            count = config.frames_of(length)
            frames, noise = _part(given.video.frames, count, end, *size), draws["video"]
        drawn = None if noise is None else noise[:, :, :length]
        ends[end] = stages.encode_clips(frames, drawn)
    made = given_frames(kind, shape, **ends)
    channels = np.asarray(made.condition, stages.dtype)
    return Inputs(channels=channels, image=ends["head"] if task.begins else None)


def with_given(
    latents: AnyArray, inputs: Inputs, given: Given, settings: Settings
) -> Float[AnyArray, "n c frames h w"]:
    """Latents that are drawn, with the pictures that were given in their places."""
    kind = condition_of(given, settings)
    if kind is None or inputs.channels is None:
        return latents
    channels = jnp.asarray(inputs.channels)
    drawn = jnp.asarray(latents)
    found = GivenFrames(channels[:, :1], channels[:, 1:].astype(drawn.dtype))
    return put_back(kind, drawn, found)


def picture_frame(
    picture: Picture, width: int, height: int
) -> Float[np.ndarray, "1 1 height width 3"]:
    """A picture that fills the frame: as large as it must be, and its middle; in [-1, 1]."""
    from PIL.Image import Resampling

    return _scaled(np.asarray(_filling(picture, width, height, Resampling.BICUBIC)))[None, None]


def _part(
    frames: UInt8[np.ndarray, "t h w 3"], count: int, end: str, width: int, height: int
) -> Float[np.ndarray, "1 t height width 3"]:
    """The first or last `count` frames, likewise."""
    from PIL.Image import Resampling, fromarray

    taken = frames[:count] if end == "head" else frames[-count:]
    filled = [_filling(fromarray(one), width, height, Resampling.BILINEAR) for one in taken]
    return _scaled(np.stack([np.asarray(one) for one in filled]))[None]


def _scaled(pixels: UInt8[np.ndarray, "*size 3"]) -> Float[np.ndarray, "*size 3"]:
    return 2 * (pixels.astype(np.float32) / 255) - 1


def _filling(picture: Picture, width: int, height: int, resampling: int) -> Picture:
    w, h = picture.size
    if height / h > width / w:
        wide, high = round(w * height / h), height
    else:
        wide, high = width, round(h * width / w)
    left, top = round((wide - width) / 2), round((high - height) / 2)
    larger = picture.resize((wide, high), resampling)
    return larger.crop((left, top, left + width, top + height))


def clip_size(config: PipelineConfig, picture: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a clip that begins or ends with a picture of these: of the published sizes
    of the model's own area the one that is nearest in aspect; its own where that is none of them.
    """
    own = config.height, config.width
    tables = (video_sizes(area, config.unit).values() for area in AREAS)
    sizes = next((table for table in tables if own in table), [own])
    aspect = picture[0] / picture[1]
    height, width = min(sizes, key=lambda size: abs(np.log(size[1] / size[0] / aspect)))
    return width, height
