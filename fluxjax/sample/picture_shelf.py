"""Drawn pictures become files, each with its record and under a name that is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fluxjax import __version__
from fluxjax.atomic_write import remove_leftovers, write_new
from fluxjax.checkpoint.lora.scaled_file import split_scale
from fluxjax.config import ConfigError
from fluxjax.sample.clip_files import require_clip_name, still_pixels, usual_suffix, write_clip
from fluxjax.sample.file_names import CLIP_FORMATS, FORMATS, file_name
from fluxjax.sample.given_options import destination
from fluxjax.sample.opened_model import OpenedModel
from fluxjax.sample.options import Options
from fluxjax.sample.parameters_line import parameters_text
from fluxjax.sample.picture_formats import encode_picture
from fluxjax.sample.picture_jobs import Job
from fluxjax.sample.picture_record import record_of
from fluxjax.sample.sources import model_name
from fluxjax.terminal import print_line

if TYPE_CHECKING:
    import numpy as np

    from fluxjax.sample.pipeline import Pipeline


class PictureShelf:
    """Where pictures go as they are drawn, under names that are free."""

    def __init__(self, options: Options, opened: OpenedModel, note: Callable[[str], None]) -> None:
        self.options, self.opened, self.note = options, opened, note
        self.folder, self.file = destination(options)
        for suffix in {*FORMATS, *CLIP_FORMATS}:
            remove_leftovers(self.folder, f".*{suffix}")
        self._drawn: dict[int, tuple[np.ndarray, dict[str, Any]]] = {}

    def check(self, job: Job) -> None:
        """Raises ConfigError where the job cannot be written under its name."""
        path = self.path(job)
        if job.settings.frames > 1:
            require_clip_name(path)
        elif path.suffix.lower() not in FORMATS:
            raise ConfigError(f"{path}: pictures are written as {', '.join(FORMATS)}")

    def save(self, job: Job, picture: np.ndarray | Iterator[np.ndarray], pipe: Pipeline) -> None:
        """Write one picture, or the frames of a clip with its stills, and print its line."""
        settings, wanted = job.settings, self.path(job)
        record, parameters = self._record(job, pipe) if self.options.record else (None, "")
        if settings.frames > 1:
            frames = settings.frames - pipe.config.dropped_frames
            path, *stills = write_clip(
                wanted, picture, fps=settings.fps, frames=frames, record=record
            )
            shown = still_pixels(stills[len(stills) // 2])  # the middle one is what a sheet shows
        else:
            shown = cast("np.ndarray", picture)
            path = write_new(wanted, self._encoded(shown, wanted, record, parameters))
        if self.file is not None and path != wanted:
            self.note(f"{wanted} was there already and is kept")
        spent = "  ".join(f"{phase} {seconds:.2f} s" for phase, seconds in pipe.seconds.items())
        print_line(str(path) if self.options.quiet else f"{path}  seed {settings.seed}  {spent}")
        if self.options.grid:
            about = {"file": path.name, **(record or {}).get("settings", {})}
            self._drawn[job.place] = shown, about

    def path(self, job: Job) -> Path:
        """What the picture will be called if the name is free."""
        model, number = model_name(self.opened.sources.model), job.place + 1
        usual = usual_suffix() if job.settings.frames > 1 else ".png"
        name = file_name(job.settings, self.options.name, number=number, model=model, usual=usual)
        return self.file or self.folder / name

    def _record(self, job: Job, pipe: Pipeline) -> tuple[dict[str, Any] | None, str]:
        if not self.options.record:
            return None, ""
        sources, hashes = self.opened.with_lora(job.lora), self.opened.hashes(job.lora)
        record = record_of(job.settings, sources, hashes, str(pipe.dtype), self.folder)
        names = [Path(split_scale(one)[0]).stem for one in job.lora]
        loras = {name: hashes[f"lora {i}"] for i, name in enumerate(names, start=1)}
        model = model_name(sources.model)
        refiner = sources.refiner and model_name(sources.refiner)
        said = parameters_text(job.settings, pipe.config, model, __version__, loras, refiner)
        return record, said

    def _encoded(
        self, picture: np.ndarray, path: Path, record: dict[str, Any] | None, parameters: str
    ) -> bytes:
        from PIL import Image

        image = Image.fromarray(picture)
        try:
            return encode_picture(image, path.suffix, record, parameters)
        except ConfigError as error:  # the picture is worth more than its record
            self.note(f"{path}: {error}; it is written without a record")
            return encode_picture(image, path.suffix)

    def save_sheet(self) -> None:
        from PIL import Image

        from fluxjax.picture_sheet import picture_sheet

        pictures, about = zip(*(self._drawn[place] for place in sorted(self._drawn)), strict=True)
        sheet = Image.fromarray(picture_sheet(pictures))
        record = {"fluxjax": __version__, "pictures": about} if self.options.record else None
        content = encode_picture(sheet, ".png", record)
        print_line(str(write_new(self.folder / "grid.png", content)))
