"""Open-Sora 2.0's noise levels, shifted by the size of a video, and its guidance step by step.

Source: hpcaitech/Open-Sora `opensora/utils/sampling.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fluxjax.config.open_sora_pipeline import LEVELS
from fluxjax.config.scheduler import SchedulerConfig
from fluxjax.schedules.flow_euler import check_steps

STEADY_STEPS = 10
"""Steps before which guidance does not oscillate."""


class VideoGuidance(NamedTuple):
    """How far a video is guided by its text and by the pictures that it is given."""

    text: float = 7.5
    image: float = 3.0
    text_oscillates: bool = True
    """Whether every second step, from `STEADY_STEPS` on, is not guided by the text."""
    image_oscillates: bool = True
    by_frame: bool = True
    """Whether guidance by a picture grows from frame to frame, and falls from step to step."""


GUIDED = VideoGuidance()


def shift_of(tokens_per_frame: int, frames: int, scheduler: SchedulerConfig = LEVELS) -> float:
    """How far the levels are moved towards noise: for a picture 1 at 256 tokens and 3 at 4096, on
    the line through both, for a video times the root of its latent frames."""
    if not scheduler.use_dynamic_shifting:
        return scheduler.shift
    return scheduler.mu(tokens_per_frame) * frames**0.5


def open_sora_levels(
    steps: int,
    tokens_per_frame: int,
    frames: int,
    scheduler: SchedulerConfig = LEVELS,
    *,
    flow_shift: float | None = None,
) -> Float[np.ndarray, "levels"]:
    """The noise levels from 1 down to 0, one more than steps, float32, for `flow_euler`.

    `frames`: of latents. `flow_shift` is taken in place of `shift_of`.
    Raises ConfigError for steps outside 1 ... 1000.
    """
    levels = np.linspace(1.0, 0.0, check_steps(steps) + 1)
    shift = shift_of(tokens_per_frame, frames, scheduler) if flow_shift is None else flow_shift
    return (shift * levels / (1.0 + (shift - 1.0) * levels)).astype(np.float32)


def open_sora_passes(
    steps: int, frames: int, guidance: VideoGuidance = GUIDED, *, pictures: bool = True
) -> Float[np.ndarray, "steps differences frames"]:
    """How three passes are added up, see `fluxjax.sample.denoise.combined`: the prompt's, the
    negative prompt's with the same pictures, and that without pictures.

    `pictures`: whether the condition is a picture (i2v), the only kind with guidance by frame: at
    the first frame it is 1, the picture's own.
    """
    step = np.arange(steps)
    resting = (step >= STEADY_STEPS) & (step % 2 == 1)
    text = np.where(resting & guidance.text_oscillates, 1.0, guidance.text)
    image = np.where(resting & guidance.image_oscillates, 1.0, guidance.image)
    by_frame = np.repeat(image[:, None], frames, axis=1)
    if guidance.by_frame and pictures and guidance.image > 1.0:
        last = np.linspace(guidance.image, 1.0, steps + 1)[:-1]
        growing = np.linspace(np.ones(steps), last, frames, axis=1)
        by_frame = np.where(image[:, None] > 1.0, growing, by_frame)
    weights = np.stack([np.repeat(text[:, None], frames, axis=1), by_frame], axis=1)
    return weights.astype(np.float32)


def fewest_passes(
    weights: Float[np.ndarray, "steps differences frames"], *, given: bool
) -> Float[np.ndarray, "steps fewer frames"]:
    """Of three passes as many as give the same: where nothing is `given` the last two are the same,
    and a pass whose weight is 1 at every step adds nothing."""
    if not given or (weights[:, 1] == 1).all():
        weights = weights[:, :1]
        if (weights == 1).all():
            weights = weights[:, :0]
    return weights
