"""The ensemble of experts of Stable Diffusion XL: a refiner draws the last steps.

Source: diffusers' `denoising_end` and `denoising_start`; Podell et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from fluxjax.config import ConfigError
from fluxjax.families.family import Steps
from fluxjax.sample.given_pictures import Given
from fluxjax.sample.settings import Settings
from fluxjax.schedules.step_table import Run

if TYPE_CHECKING:
    from fluxjax.sample.pipeline import Pipeline

START = 0.8
_DRAW = "refiner "
_Latents = Float[Array | np.ndarray, "n c h w"]


class Calls(NamedTuple):
    """What is called while the refiner draws, `progress`, `on_step` and `every` of `denoise`."""

    before: int
    """Evaluations of the base model, which are counted too."""
    progress: Callable[[int], None] | None
    on_step: Callable[[int, Any], None] | None
    every: int


class Refiner:
    """A pipeline that goes on with another one's latents, and the time it takes is that one's."""

    def __init__(self, pipe: Pipeline, base: Pipeline):
        self.pipe = pipe
        pipe.seconds, pipe.notes = base.seconds, base.notes

    def check(self, settings: Settings) -> None:
        """Raises ConfigError for settings that it does not have, or that leave it no step."""
        self.pipe.check(_own(settings), refines=True)
        self.run_of(settings)

    def run_of(self, settings: Settings) -> Run:
        """Its steps."""
        family, config = self.pipe.family, self.pipe.config
        shape = family.shape_of(config, settings.width, settings.height)
        return family.run(config, self._course(settings), *shape[1:])

    def draws(self, settings: Settings) -> list[str]:
        """What noise is drawn for, after the base model's."""
        return [f"{_DRAW}step {i}" for i in np.flatnonzero(self.run_of(settings).draws)]

    def prepare(self, settings: Settings, count: int) -> None:
        """Start to compile in the background what so many pictures will need."""
        self.pipe.prepare(_own(settings), count, course=self._course(settings))

    def refine(
        self,
        latents: _Latents,
        settings: Settings,
        prompts: Sequence[str],
        number: int,
        drawn: Mapping[str, Array | np.ndarray],
        calls: Calls,
    ) -> _Latents:
        """The latents of the base model's last step, drawn to the end; `pipe` decodes them.

        `drawn`: of `Stages.draw_each`, the base model's too.
        """
        own, pipe = _own(settings), self.pipe
        scale = pipe.family.scale(pipe.config, own.asked_guidance)
        conditioning, negative = pipe.hear(own, prompts, number, scale, changed=True)
        progress, on_step = calls.progress, calls.on_step
        return pipe.denoise(
            conditioning,
            np.asarray(latents),
            steps=self._course(settings),
            guidance=own.guidance,
            negative=negative,
            true_cfg=scale,
            added={name[len(_DRAW) :]: x for name, x in drawn.items() if name.startswith(_DRAW)},
            rescale=own.guidance_rescale,
            rounding=own.rounding,
            progress=progress and (lambda done: progress(calls.before + done)),
            on_step=on_step and (lambda done, state: on_step(calls.before + done, state)),
            every=calls.every,
        )

    def _course(self, settings: Settings) -> Steps:
        course = settings.course(self.pipe.family.first_step)
        return course._replace(first=0, begin=settings.refiner_start, end=None)


def completed(refiner: Refiner | None, settings: Settings, given: Given) -> Settings:
    """With where it begins. Raises ConfigError for a beginning of none, and for a mask."""
    if refiner is None:
        if settings.refiner_start is not None:
            raise ConfigError(
                "refiner_start says where a refiner takes over: give its folder too, as refiner "
                "(--refiner)"
            )
        return settings
    if given.mask is not None:
        raise ConfigError("a refiner goes on with pictures from text or from an image, not a mask")
    start = START if settings.refiner_start is None else settings.refiner_start
    return replace(settings, refiner_start=start)


def _own(settings: Settings) -> Settings:
    """Its one text encoder reads the prompt, as in diffusers; images and target sizes are the base
    model's."""
    others = "prompt_2", "image", "strength", "refiner_start", "target_size", "negative_target_size"
    return replace(settings, **dict.fromkeys(others))
