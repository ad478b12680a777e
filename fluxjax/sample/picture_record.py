"""What a picture says about how it was made, and finding again what it was made with.

A picture travels, so its record holds no path that leads out of where it was drawn: files below the
current folder by their path from the picture, all others by name, each with its hash. A picture may
also be a stranger's: what it names is opened only where it was given on the command line or lies in
the usual places (the picture's folder, the current one, and where a file of that hash lay when this
user drew with it; of names on a hub, its cache), unless all is allowed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from fluxjax import __version__
from fluxjax.checkpoint.lora.scaled_file import split_scale
from fluxjax.config import CONTROLS, IP_IMAGES, ConfigError
from fluxjax.file_hash import hash_file
from fluxjax.hub import is_cached, shipped_folder
from fluxjax.sample import known_places
from fluxjax.sample.clip_files import read_clip_record
from fluxjax.sample.override import override
from fluxjax.sample.settings import ALPHA, PICTURES, Dtype, Settings, brief
from fluxjax.sample.sources import (
    SCALED,
    SINGLE,
    TEXTS,
    TINY,
    Sources,
    changed,
    hashes_of,
    is_name,
)

_OPTIONS = {
    **{
        name: f"--{name.replace('_', '-')}"
        for name in (*SINGLE, "redux_image", "controlnet", "ip_adapter", *PICTURES)
    },
    **dict.fromkeys(CONTROLS, "--control"),
    **dict.fromkeys(IP_IMAGES, "--ip-image"),
}
_MOST_LORAS = 100


def record_of(
    settings: Settings,
    sources: Sources,
    hashes: Mapping[str, str],
    dtype: str,
    folder: Path,
    *,
    unrepeatable: str = "",
) -> dict[str, Any]:
    """The record of a picture that lies in `folder`; `unrepeatable`: why, if it is.

    Paths in `sources` are absolute. Names of files outside are remembered with their places.
    """
    for name in PICTURES:
        path = getattr(settings, name)
        if path is not None and (name, path) != ("mask", ALPHA):
            digest = {"": getattr(settings, f"{name}_sha256") or hash_file(Path(path))}
            stored = {name: _stored(path, folder, digest), f"{name}_sha256": digest[""]}
            settings = dataclasses.replace(settings, **stored)
    record: dict[str, Any] = {"fluxjax": __version__, "dtype": dtype}
    for kind, path in sources.files().items():
        if kind in SINGLE:
            record[kind] = _stored(path, folder, _of_kind(hashes, kind))
    for name in SCALED:
        if scaled := getattr(sources, name):
            record[name] = [
                f"{_stored(file, folder, _of_kind(hashes, f'{name} {i}'))}:{scale:g}"
                for i, (file, scale) in enumerate(map(split_scale, scaled), start=1)
            ]
    texts = {name: getattr(sources, name) for name in TEXTS}
    record |= {name: text for name, text in texts.items() if text is not None}
    record |= {"sha256": dict(hashes), "settings": dataclasses.asdict(settings)}
    return record | ({"unrepeatable": unrepeatable} if unrepeatable else {})


def _of_kind(hashes: Mapping[str, str], kind: str) -> dict[str, str]:
    """As `hashes_of` names them."""
    return {
        name.removeprefix(kind).strip(): digest
        for name, digest in hashes.items()
        if name == kind or name.startswith(f"{kind} ")
    }


def _stored(path: str, folder: Path, hashes: Mapping[str, str]) -> str:
    if is_name(path):
        return path
    here = Path.cwd()
    if _below(Path(path), here) and _below(folder.absolute(), here):
        text = PurePath(os.path.relpath(path, folder)).as_posix()
    else:
        known_places.remember(path, hashes)
        text = PurePath(path).name
    return text.encode(errors="replace").decode()  # bytes of a name that are no UTF-8


def _below(path: Path, folder: Path) -> bool:
    return Path(os.path.normpath(path)).is_relative_to(folder)


@dataclass(frozen=True)
class Remembered:
    """A picture's record, checked: `settings` are those it names, `sources` as it names them."""

    path: Path
    settings: dict[str, Any]
    sources: Sources
    dtype: Dtype | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    version: str = ""


def remembered(path: Path) -> Remembered:
    """Raises FileNotFoundError, or ConfigError for what is no picture, was not made here, cannot be
    repeated or says what no picture is made with."""
    record = read_clip_record(path)
    if isinstance(record.get("pictures"), list) and "settings" not in record:
        raise ConfigError(f"{path} is a sheet: --like takes one of its pictures{_named(record)}")
    why = record.get("unrepeatable")
    if why:
        raise ConfigError(f"{path} cannot be repeated: {brief(why)}")
    settings: Any = record.get("settings")
    hashes = record.get("sha256", {})
    _check(isinstance(settings, dict), path, "settings", "an object", settings)
    _check(_are_texts(hashes, dict), path, "sha256", "an object of texts", hashes)
    override(Settings(), settings, str(path))
    for name in (*SINGLE, "dtype", *TEXTS):
        value = record.get(name)
        _check(isinstance(value, str | None), path, name, "a text", value)
    scaled = {name: record.get(name, []) for name in SCALED}
    for name, listed in scaled.items():
        fine = _are_texts(listed, list) and len(listed) <= _MOST_LORAS
        _check(fine, path, name, "a list of texts", listed)
    single = {name: record.get(name) for name in (*SINGLE, *TEXTS) if name != "model"}
    listings: dict[str, Any] = {name: tuple(listed) for name, listed in scaled.items()}
    sources = Sources(
        model=record.get("model") or TINY,
        **single,
        **listings,
    )
    version = record.get("fluxjax")
    version = version if isinstance(version, str) else ""
    return Remembered(path, settings, sources, record.get("dtype"), hashes, version)


def _check(condition: bool, path: Path, name: str, wanted: str, value: Any) -> None:
    if not condition:
        raise ConfigError(f"{path}: its {name} must be {wanted}, got {brief(value)}")


def _are_texts(values: Any, kind: type) -> bool:
    if not isinstance(values, kind):
        return False
    texts = values.values() if isinstance(values, dict) else values
    return all(isinstance(text, str) for text in texts)


def _named(record: dict[str, Any]) -> str:
    names = [one.get("file") for one in record["pictures"] if isinstance(one, dict)]
    names = [name for name in names if isinstance(name, str)]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f": {', '.join(names[:8])}{more}" if names else ""


def find(said: Remembered, kind: str, where: str, hashes: Mapping[str, str], every: bool) -> str:
    """The absolute path of what the record calls `where`, in the usual places, or in `every` one.

    What has the right hashes is preferred to what has only the name. Raises ConfigError.
    """
    if is_name(where) and (shipped_folder(where) or every or is_cached(where)):
        return where
    usual = [said.path.absolute().parent, Path.cwd()]
    try:
        places = [folder / part for folder in usual for part in (where, PurePath(where).name)]
        found = [Path(os.path.normpath(place)) for place in places]
        found = [path for path in found if any(_below(path, folder) for folder in usual)]
        if hashes and (known := known_places.recall(hashes)):
            found.append(known)
        if every:
            found.append(Path(os.path.normpath(usual[0] / where)))
        found = [path for path in dict.fromkeys(found) if path.exists()]
        if len(found) > 1 and hashes:
            found.sort(key=lambda path: hashes_of(str(path), kind) != dict(hashes))
    except (OSError, ValueError) as error:  # a name of strangers: too long, or with a NUL
        why = getattr(error, "strerror", None) or error  # without the name, which may be long
        raise ConfigError(f"{said.path}: its {kind} cannot be opened ({why})") from None
    if found:
        return str(found[0])
    option = _OPTIONS.get(kind, "--lora")
    raise ConfigError(
        f"{said.path} was made with the {kind} {brief(where)}, which is not in the usual places "
        f"(the picture's folder, the current one): give it with {option}"
        + ("" if every else ", or allow every path with --like-paths")
    )


def find_all(
    said: Remembered, given: Mapping[str, Any], *, every: bool
) -> tuple[Sources, dict[str, str]]:
    """(sources, pictures by name) in full, save those that the command line has `given`."""
    wanted = said.sources

    def place(kind: str) -> str | None:
        where = getattr(wanted, kind)
        if where is None or given.get(kind) is not None:
            return where
        return find(said, kind, where, _of_kind(said.hashes, kind), every)

    def places(name: str) -> tuple[str, ...]:
        listed = () if given.get(name) else getattr(wanted, name)
        kind = "LoRA" if name == "lora" else name
        return tuple(
            f"{find(said, kind, file, _of_kind(said.hashes, f'{name} {i}'), every)}:{scale:g}"
            for i, (file, scale) in enumerate(map(split_scale, listed), start=1)
        )

    single: dict[str, Any] = {name: place(name) for name in SINGLE if name != "model"}
    single |= {name: getattr(wanted, name) for name in TEXTS}
    listings: dict[str, Any] = {name: places(name) for name in SCALED}
    sources = Sources(
        model=place("model") or TINY,
        **single,
        **listings,
    )
    pictures: dict[str, str] = {}
    for name in PICTURES:
        where = said.settings.get(name)
        if where is None or (name, where) == ("mask", ALPHA) or given.get(name) is not None:
            continue
        digest = said.settings.get(f"{name}_sha256")
        pictures[name] = find(said, name, where, {"": digest} if digest else {}, every)
    return sources, pictures


def differences(said: Remembered, now: Mapping[str, str], kinds: list[str]) -> list[str]:
    """What of these kinds is not what it was; a record without hashes knows nothing."""
    return [name for kind in kinds for name in changed(said.hashes, now, kind) if said.hashes]
