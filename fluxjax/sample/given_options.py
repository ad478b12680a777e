"""What the options of `python -m fluxjax.sample` ask for, and what can be said against it.

Without JAX, and apart from the options: `--help` needs none of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fluxjax.clip_reader import VIDEOS
from fluxjax.config import ConfigError, multiple
from fluxjax.config.choices import CONTROLS, IP_IMAGES
from fluxjax.hub import embedded_adapter, embedded_names, size_unit
from fluxjax.parallel.mesh_shape import parse_mesh
from fluxjax.picture_files import EXTENSIONS
from fluxjax.quantised_kinds import KEEP
from fluxjax.sample.embedded_tools import TOOLS
from fluxjax.sample.file_names import (
    CLIP_FORMATS,
    FORMATS,
    PATTERN,
    check_pattern,
    is_picture_name,
)
from fluxjax.sample.options import Options
from fluxjax.sample.override import override
from fluxjax.sample.prompts_file import STANDARD_INPUT
from fluxjax.sample.quantise_option import parse_quantise
from fluxjax.sample.settings import ALPHA, FIELDS, PICTURES, Settings, brief
from fluxjax.sample.sources import SCALED, SINGLE, TEXTS, TINY, absolute, absolute_scaled, is_name

MOST_PICTURES = 2**20  # of one run
_FLAGS = ("soft_mask", "loop", "clean_caption")
_NAMED = (
    *("model", "first_frame_model", "image", "mask", "negative_ip_image", "reference", "last"),
    *("video", "quantise", "coordinator", "lora", "redux_image", "control", "controlnet"),
    *("ip_adapter", "ip_image"),
)


def check(options: Options) -> None:
    """Raises ConfigError, or OSError, for what cannot be; before JAX is imported."""
    if not 1 <= options.number <= MOST_PICTURES:
        least = "at least 1" if options.number < 1 else f"at most {MOST_PICTURES}"
        raise ConfigError(f"number must be {least}, got {brief(options.number)}")
    for name in _NAMED:  # a shell's variable that is not set is not the default
        value = getattr(options, name)
        if value == "" or (isinstance(value, tuple) and "" in value):
            raise ConfigError(f"--{name.replace('_', '-')} is empty: give a value, or leave it out")
    if options.prompts is not None and (options.prompt or options.like is not None):
        other = "--like" if options.like is not None else "a PROMPT"
        raise ConfigError(f"give {other} or --prompts, not both")
    if options.like is None and (options.like_anyway or options.like_paths):
        raise ConfigError("--like-anyway and --like-paths say how to take --like: give that too")
    if not options.prompt and options.like is None and options.prompts is None:
        raise ConfigError("there is nothing to draw: give a PROMPT, --prompts or --like")
    if options.preview is not None and options.preview < 1:
        raise ConfigError(f"preview must be at least 1 step, got {brief(options.preview)}")
    if options.preview_decoder and options.preview is None:
        raise ConfigError("--preview-decoder decodes previews: give --preview N too")
    given = given_settings(options)
    override(Settings(), given)
    unit = size_unit(options.model or TINY)
    for name in ("width", "height"):
        if given[name] is not None:
            multiple(name, given[name], unit)
    sources = given_sources(options)
    for model in (sources["model"], sources["refiner"], options.first_frame_model):
        _check_model(model)
    if options.like is None and (sources["redux"] is None) != (sources["redux_image"] == ()):
        raise ConfigError("--redux FOLDER and --redux-image FILE belong together: give both")
    if options.controlnet and not options.control and not (options.like or options.prompts):
        raise ConfigError("--controlnet FOLDER needs a picture that it sees: give --control FILE")
    _check_ip_adapter(options)
    if sources["redux"] and not (is_name(sources["redux"]) or Path(sources["redux"]).exists()):
        raise FileNotFoundError(f"there is no Redux folder {sources['redux']}")
    named = [("video" if name == "video" else f"{name} picture", given[name]) for name in PICTURES]
    for kind, path in (*named, ("file", options.prompts)):
        if path not in (None, STANDARD_INPUT, ALPHA) and not Path(path).exists():
            raise FileNotFoundError(f"there is no {kind} {path}")
    parse_mesh(options.mesh or "")
    if options.sequence is not None and options.mesh is None:
        raise ConfigError("--sequence says how a mesh splits tokens: give --mesh too")
    if options.mesh is not None and (options.offload or options.stream):
        raise ConfigError("--offload and --stream are for one device: give them or --mesh")
    parse_quantise(options.quantise or KEEP)
    if options.canny is not None:
        from fluxjax.sample.edges import require_opencv

        require_opencv()
    check_pattern(options.name)
    destination(options)
    if options.like is not None:
        from fluxjax.sample.picture_record import remembered

        remembered(options.like)


def _check_ip_adapter(options: Options) -> None:
    if len(options.ip_adapter) > len(IP_IMAGES):
        raise ConfigError(
            f"--ip-adapter is given {len(options.ip_adapter)} times, and at most {len(IP_IMAGES)} "
            "go together"
        )
    if options.like or options.prompts:
        return
    if options.ip_adapter and not options.ip_image:
        raise ConfigError("--ip-adapter FILE needs a picture that it sees: give --ip-image FILE")
    if options.ip_image and not options.ip_adapter:
        raise ConfigError("--ip-image is seen by an IP-Adapter: give --ip-adapter FILE")


def _check_model(model: str | None) -> None:
    """Raises FileNotFoundError, with the name that may be meant."""
    if model is None or is_name(model) or Path(model).exists():
        return
    from difflib import get_close_matches

    path = Path(model)
    beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    names = [*embedded_names(), *filter(embedded_adapter, TOOLS.values())]
    names += [entry.name for entry in beside]
    near = get_close_matches(path.name, [name for name in names if name != path.name], 1)
    what = "file" if path.suffix[1:].isalpha() else "folder"
    meant = f"; did you mean {near[0]}?" if near else ""
    raise FileNotFoundError(f"there is no model {what} {path}{meant}")


def given_settings(options: Options) -> dict[str, Any]:
    """The settings on the command line; None is what is not there."""
    given = {name: getattr(options, name, None) for name in FIELDS}
    given["prompt"] = " ".join(options.prompt) if options.prompt else None
    for option, names, files in (
        ("--control", CONTROLS, options.control),
        ("--ip-image", IP_IMAGES, options.ip_image),
    ):
        if len(files) > len(names):
            raise ConfigError(
                f"{option} is given {len(files)} times, and at most {len(names)} go together"
            )
        given[names[0]] = None
        given |= dict(zip(names, files, strict=False))
    given["control_mode"] = options.control_mode or None
    given["control_range"] = _ranges(options.control_range) or None
    for name in PICTURES:
        if given[name] is not None and (name, str(given[name])) != ("mask", ALPHA):
            given[name] = absolute(str(given[name]))
    flags: dict[str, Any] = {name: getattr(options, name) or None for name in _FLAGS}
    flags["size_bins"] = None if options.size_bins else False
    flags["oscillation"] = options.oscillation and None
    return {**given, **flags}


def _ranges(texts: tuple[str, ...]) -> tuple[float, ...]:
    try:
        return tuple(float(part) for text in texts for part in _pair(text))
    except ValueError:
        shown = " ".join(texts)
        raise ConfigError(
            f"--control-range must be START,END, such as 0,0.8, got {brief(shown)}"
        ) from None


def _pair(text: str) -> tuple[str, str]:
    start, end = text.split(",")
    return start, end


def given_sources(options: Options) -> dict[str, Any]:
    """The fields of Sources on the command line, in full; None or () is what is not there."""
    paths = {name: getattr(options, name) for name in SINGLE}
    given: dict[str, Any] = {name: p and absolute(str(p)) for name, p in paths.items()}
    given |= {name: getattr(options, name) for name in TEXTS}
    for name, what in SCALED.items():
        given[name] = tuple(absolute_scaled(one, what) for one in getattr(options, name))
    return given


def destination(options: Options) -> tuple[Path, Path | None]:
    """(folder, file): `file` where one picture's own name is given.

    Raises ConfigError for a name of another kind, NotADirectoryError and PermissionError for a
    folder that cannot be made or written.
    """
    out = options.out.expanduser()
    file = out if is_picture_name(out) and not out.is_dir() else None
    if file is None and not out.is_dir():
        if out.suffix.lower() in (*EXTENSIONS, *VIDEOS):
            pictures, clips = ", ".join(FORMATS), ", ".join(CLIP_FORMATS)
            raise ConfigError(
                f"{out}: pictures are written as {pictures}, clips as {clips}, not as {out.suffix}"
            )
        if out.exists():
            raise ConfigError(f"{out} is a file, but no picture's: give a folder, or a new name")
    if file is not None and options.name != PATTERN:
        raise ConfigError("--out names the file, and so does --name: give a folder as --out")
    folder = out if file is None else out.parent
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.exists():
        raise ConfigError(f"{there} is a link that leads nowhere: no pictures can go into {folder}")
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file: no folder {folder} can be made there")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} cannot be written: pictures are to go into {folder}")
    return folder, file
