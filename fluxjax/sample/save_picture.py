"""Pictures of the Python API as files that remember how they were made, as the command's do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxjax import __version__
from fluxjax.atomic_write import write_new
from fluxjax.config import ConfigError, PipelineConfig
from fluxjax.sample.clip_files import Clip, write_clip
from fluxjax.sample.file_names import FORMATS
from fluxjax.sample.parameters_line import parameters_text
from fluxjax.sample.picture_formats import encode_picture
from fluxjax.sample.picture_record import record_of
from fluxjax.sample.settings import Settings
from fluxjax.sample.sources import Sources, model_name

if TYPE_CHECKING:
    from PIL.Image import Image

SAVED = "fluxjax made"  # in Image.info, which copies of a picture keep


@dataclass(frozen=True)
class Made:
    """What a picture was drawn from; `parameters` are for other programs, `unrepeatable` says why
    `--like` cannot repeat it."""

    settings: Settings
    sources: Sources
    dtype: str
    parameters: str
    unrepeatable: str = ""

    def record(self, folder: Path) -> dict[str, Any]:
        """Of a file that lies in `folder`."""
        sources = self.sources
        files = sources, sources.hashes(), self.dtype, folder
        return record_of(self.settings, *files, unrepeatable=self.unrepeatable)


def save_picture(picture: Image, path: str | Path) -> Path:
    """Write a picture of a pipeline with its record, for `python -m fluxjax.sample --like`.

    The suffix names the format: .png, .jpg or .webp. A file that is there is kept and the new one
    gets a number; returns its path. Raises ConfigError for a picture that no pipeline drew, for
    another suffix, and for a record that is too long for a JPEG or WebP; OSError.
    """
    path, made = Path(path), picture.info.get(SAVED)
    if not isinstance(made, Made):
        raise ConfigError("this picture does not say how it was made: no pipeline returned it")
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{path}: pictures are written as {', '.join(FORMATS)}")
    record = made.record(path.parent)
    return write_new(path, encode_picture(picture, path.suffix, record, made.parameters))


def save_clip(clip: Clip, path: str | Path) -> list[Path]:
    """Write a clip of a pipeline with its record, and its first, middle and last frame beside it.

    The suffix names the format, .mp4 (which needs PyAV) or .webp. Returns the paths, the clip's
    first; errors and taken names are those of `save_picture`.
    """
    path, made = Path(path), clip.info.get(SAVED)
    record = None if made is None else made.record(path.parent)
    if record is None:
        raise ConfigError("this clip does not say how it was made: no pipeline returned it")
    return write_clip(
        path, [clip.frames], fps=int(clip.fps), frames=len(clip.frames), record=record
    )


def tell_made(
    pictures: Sequence[Image | Clip],
    settings: Settings,
    prompts: Sequence[str],
    seeds: int | Sequence[int],
    sources: Sequence[Sources],
    config: PipelineConfig,
    dtype: str,
    *,
    unrepeatable: str = "",
) -> None:
    """Leave in each picture of a batch what it was made from; `sources` are of each."""
    number = len(pictures) // len(prompts)
    if isinstance(seeds, int):
        if len(pictures) > 1 and not unrepeatable:
            unrepeatable = f"one of {len(pictures)} pictures from one seed; give each its own"
        seeds = [seeds] * len(pictures)
    for i, picture in enumerate(pictures):
        one = replace(settings, prompt=prompts[i // number], seed=seeds[i])
        model = model_name(sources[i].model)
        refiner = sources[i].refiner
        refiner = refiner and model_name(refiner)
        parameters = parameters_text(one, config, model, __version__, {}, refiner)
        picture.info[SAVED] = Made(one, sources[i], dtype, parameters, unrepeatable)
