"""What `python -m fluxjax.sample` does: jobs from options, files and pictures; then drawing."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

from fluxjax import __version__
from fluxjax.config import ConfigError
from fluxjax.hub import shipped_folder
from fluxjax.sample import picture_record
from fluxjax.sample.embedded_tools import TOOLS, with_tool
from fluxjax.sample.given_options import given_settings, given_sources
from fluxjax.sample.opened_model import OpenedModel
from fluxjax.sample.options import Options
from fluxjax.sample.picture_jobs import Job, batches, picture_jobs
from fluxjax.sample.picture_record import Remembered, remembered
from fluxjax.sample.picture_shelf import PictureShelf
from fluxjax.sample.prompts_file import Line, read_prompts
from fluxjax.sample.settings import PICTURES, Settings
from fluxjax.sample.sources import SCALED, SINGLE, TINY, Sources, replaced
from fluxjax.terminal import say


def draw(options: Options) -> int:
    """Draw, save and report every picture that `options` ask for, once they are checked."""
    import jax

    from fluxjax.parallel import hosts
    from fluxjax.sample.cache import enable_cache

    silent = options.quiet or jax.process_index() > 0
    note = (lambda text: None) if silent else (lambda text: say(f"note: {text}"))
    if refused := enable_cache():
        note(refused)
    sources, repeated, dtype = _sources(options, note)
    # Process 0 draws seeds and reads files for all.
    lines = [Line(*line) for line in hosts.from_first(lambda: _lines(options))]
    if options.like is None and not any(line.lora for line in lines):
        given = given_settings(options)
        sources = with_tool(sources, [{**given, **line.values} for line in lines], note)
    opened = OpenedModel(options, sources, dtype)
    wanted = _wanted(options, repeated, lines, opened)
    asked = repr(dataclasses.replace(options, process_id=None))
    hosts.agree({"options": hashlib.sha256(asked.encode(errors="replace")).hexdigest()[:16]})
    with hosts.others_may_end():
        _draw_all(wanted, opened, options, note)
        hosts.barrier("drawn")  # who leaves earlier would be missed
    return 0


def _lines(options: Options) -> list[Line]:
    return [Line("", {})] if options.prompts is None else read_prompts(options.prompts)


def _wanted(
    options: Options, repeated: dict[str, Any], lines: Sequence[Line], opened: OpenedModel
) -> list[Job]:
    from fluxjax.parallel import hosts
    from fluxjax.sample.known_words import outside_sizes

    def on_first() -> list[dict[str, Any]]:
        return [
            dataclasses.asdict(job)
            for job in picture_jobs(options, repeated, lines, opened.sources.lora, opened.pipeline)
        ]

    if options.first_frame_model is not None:
        from fluxjax.sample.first_frames import with_first_frames

        pipe = opened.pipeline(opened.sources.lora)
        lines = with_first_frames(options, repeated, lines, pipe)
    jobs = [
        Job(Settings(**job["settings"]), tuple(job["lora"]), job["place"])
        for job in hosts.from_first(on_first)
    ]
    if folder := shipped_folder(opened.sources.model):
        for job in jobs:  # a size that would show nothing is refused before anything is drawn
            outside_sizes(job.settings.width, job.settings.height, folder)
    return jobs


def _sources(
    options: Options, note: Callable[[str], None]
) -> tuple[Sources, dict[str, Any], str | None]:
    """(sources, settings to repeat, dtype) of --like and the command line, paths in full.

    Raises ConfigError where what --like names has changed or is not to be opened.
    """
    given = given_sources(options)
    if options.like is None:
        return replaced(Sources(), given), {}, options.dtype
    said = remembered(options.like)
    chosen = given_settings(options)
    given_all = {**given, **{name: chosen[name] for name in PICTURES}}
    sources, pictures = picture_record.find_all(said, given_all, every=options.like_paths)
    repeated = {**said.settings, **pictures}
    _tell_opened(said, sources, pictures, note)
    sources = replaced(sources, given)
    _verify(said, sources, given, options, note)
    if options.like_anyway:
        repeated |= {f"{name}_sha256": None for name in PICTURES}
    return sources, repeated, options.dtype or said.dtype


def _tell_opened(
    said: Remembered, sources: Sources, pictures: dict[str, str], note: Callable[[str], None]
) -> None:
    """Which files a picture, perhaps a stranger's, has made us open."""
    files = sources.files().items()
    named = [f"{kind} {path}" for kind, path in files if shipped_folder(path) is None]
    named += [f"{name} {path}" for name, path in pictures.items()]
    if named:
        note(f"{said.path} names: {', '.join(named)}")


def _verify(
    said: Remembered,
    sources: Sources,
    given: dict[str, Any],
    options: Options,
    note: Callable[[str], None],
) -> None:
    from fluxjax.parallel import hosts

    if not said.hashes:
        note(f"{said.path} does not say which weights it was made with: they may have changed")
        return
    now = hosts.from_first(sources.hashes)
    kinds = [*SINGLE]
    for name in SCALED:
        most = max(len(getattr(one, name)) for one in (sources, said.sources))
        kinds += [f"{name} {i}" for i in range(1, 1 + most)]
    chosen = [kind for kind in kinds if given.get(kind.split()[0])]
    if other := picture_record.differences(said, now, chosen):
        note(f"what is given is not what {said.path} was made with: {', '.join(other)}")
    other = picture_record.differences(said, now, [kind for kind in kinds if kind not in chosen])
    if not other:
        return
    made = f" (made with fluxjax {said.version})" if said.version not in ("", __version__) else ""
    text = f"not what {said.path} was made with any more{made}: {', '.join(other)}"
    if not options.like_anyway:
        raise ConfigError(f"{text}; --like-anyway draws all the same")
    note(f"{text}; drawn all the same")


def _draw_all(
    wanted: Sequence[Job], opened: OpenedModel, options: Options, note: Callable[[str], None]
) -> None:
    """Every process draws; process 0 speaks and saves."""
    import jax

    from fluxjax.sample.memory_estimate import require_room
    from fluxjax.sample.preview import previewed
    from fluxjax.sample.redux import read_heard
    from fluxjax.sample.step_progress import step_progress

    first = jax.process_index() == 0
    once = cache(note)
    shelf = PictureShelf(options, opened, note)
    for job in wanted:
        shelf.check(job)
    size = opened.pipeline(wanted[0].lora).executables.rows("denoise", 1)
    heard, _ = read_heard(opened.sources.redux_image)
    done = 0
    for batch in batches(wanted, size):
        pipe, settings = opened.pipeline(batch[0].lora), batch[0].settings
        require_room(pipe, settings, len(batch))
        if first and shipped_folder(opened.sources.model):
            _tell_unknown(batch, opened.sources.model, once)
        ends = done + len(batch)
        what = "clip" if settings.frames > 1 else "picture"
        what += f" {ends} of {len(wanted)}" if len(wanted) > 1 else ""
        prompts, seeds = zip(*((j.settings.prompt, j.settings.seed) for j in batch), strict=True)
        steps = pipe.evaluations(settings)
        with step_progress(steps, what, quiet=options.quiet) as progress, ExitStack() as s:
            on_step, every = None, options.preview or 1
            if options.preview is not None:
                path, decoder = shelf.path(batch[0]), options.preview_decoder
                on_step = s.enter_context(previewed(pipe, settings, seeds, path, decoder=decoder))
            drawn = pipe.draw_clips if settings.frames > 1 else pipe.draw
            pictures = drawn(
                settings,
                prompts=prompts,
                seeds=seeds,
                heard=heard,
                progress=progress,
                on_step=on_step,
                every=every,
            )
        done = ends
        if not first:
            continue
        for text in dict.fromkeys(pipe.notes):
            note(text)
        pipe.notes.clear()
        for job, picture in zip(batch, pictures, strict=True):
            shelf.save(job, picture, pipe)
        pipe.seconds.update(dict.fromkeys(pipe.seconds, 0.0))
    if options.grid and first:
        shelf.save_sheet()


def _tell_unknown(batch: Sequence[Job], model: str, once: Callable[[str], None]) -> None:
    from fluxjax.sample.known_words import EDITS, outside, outside_frames, outside_sizes

    folder, edits = shipped_folder(model), model == TOOLS["reference"]
    for job in batch:
        if text := outside_sizes(job.settings.width, job.settings.height, folder):
            once(text)
        if text := outside_frames(job.settings.frames, folder):
            once(text)
        if text := outside(job.settings.prompt, folder, edits=edits):
            once(text)
        if job.settings.reference and model == TINY:
            once(EDITS)
