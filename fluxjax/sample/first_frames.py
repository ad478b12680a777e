"""First frames that another model draws, from which clips then begin (Open-Sora's T2I2V).

Source: hpcaitech/Open-Sora `scripts/diffusion/inference.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fluxjax.config import ConfigError
from fluxjax.config.video_pipeline import VideoPipelineConfig
from fluxjax.sample.given_options import destination, given_settings
from fluxjax.sample.given_pictures import read_given
from fluxjax.sample.options import Options
from fluxjax.sample.override import override
from fluxjax.sample.picture_jobs import blamed
from fluxjax.sample.prompts_file import Line
from fluxjax.sample.settings import FIELDS, Settings

if TYPE_CHECKING:
    from fluxjax.sample.pipeline import Pipeline

GUIDANCE = 4.0
"""Of the model that draws them, where guidance is told to it."""


def with_first_frames(
    options: Options, repeated: Mapping[str, Any], lines: Sequence[Line], pipe: Pipeline
) -> list[Line]:
    """`lines` with a line for each clip, whose reference is a picture of its own: of its prompt,
    size, steps and seed. The pictures are kept beside the clips.

    Raises ConfigError where the model draws no clips, or none from a first frame, or where one is
    given already.
    """
    import jax

    from fluxjax.sample.loading import load_pipeline

    if pipe.config.tiling is None:
        raise ConfigError(
            f"--first-frame-model is for clips, and {pipe.config.class_name} draws pictures"
        )
    pipe.family.find_task(pipe.config, {"reference"})
    if jax.process_count() > 1:
        raise ConfigError("--first-frame-model draws in one process: give --reference files")
    base = override(override(pipe.defaults, repeated), given_settings(options))
    wanted: list[tuple[Line, Settings]] = []
    for line in lines:
        with blamed(line):
            settings = override(base, line.values)
            _check(pipe, settings)
        wanted.append((line, settings))
    painter = load_pipeline(
        str(options.first_frame_model),
        dtype=str(pipe.dtype),  # pyright: ignore[reportArgumentType]
        offload=options.offload,
        stream=options.stream,
        mesh=options.mesh,
    )
    if painter.config.tiling is not None:
        raise ConfigError(
            f"--first-frame-model is to draw pictures, and {painter.config.class_name} draws clips"
        )
    if _shift(pipe, pipe.defaults) is not None and not painter.config.scheduler.is_flow:
        raise ConfigError(
            "--first-frame-model draws by the clip's noise levels: it is to be a flow, such as "
            f"FLUX.1, and {painter.config.class_name} is none"
        )
    found: list[Line] = []
    for line, settings in wanted:
        own = (given_settings(options), line.values, repeated)
        seed = settings.seed
        if all(one.get("seed") is None for one in own):
            seed = secrets.randbelow(2**32)
        for i in range(options.number if line.number is None else line.number):
            path = _drawn(painter, pipe, settings, seed + i, destination(options)[0])
            values = {**line.values, "seed": seed + i, "reference": str(path)}
            found.append(line._replace(values=values, number=1))
    return found


def _check(pipe: Pipeline, settings: Settings) -> None:
    """Raises ConfigError for a clip that the model would refuse, before its first frame is drawn; a
    black one stands in for that."""
    from PIL.Image import new

    if settings.reference is not None or settings.video is not None:
        raise ConfigError(
            "--first-frame-model draws the first frame, and one is given: leave one of the two out"
        )
    black = new("RGB", (settings.width, settings.height))
    given, settings = read_given(settings, {"reference": black})
    pipe.check(pipe.complete(settings, given, FIELDS))


def _shift(pipe: Pipeline, settings: Settings) -> float | None:
    config = cast(VideoPipelineConfig, pipe.config)
    return config.first_frame_shift(settings.width, settings.height)


def _drawn(painter: Pipeline, pipe: Pipeline, settings: Settings, seed: int, folder: Path) -> Path:
    """The file of one first frame."""
    from fluxjax.sample.save_picture import save_picture

    size = {"width": settings.width, "height": settings.height}
    shift = _shift(pipe, settings)
    chosen: dict[str, Any] = {"steps": settings.steps, "flow_shift": shift, **size}
    if painter.config.embeds_guidance:
        chosen["guidance"] = GUIDANCE
    (picture,) = painter(settings.prompt, seed=seed, noise=settings.noise, **chosen)
    folder.mkdir(parents=True, exist_ok=True)
    return save_picture(picture, folder.absolute() / f"first-frame-{seed}.png")
