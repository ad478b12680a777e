"""What a source of pictures and clips holds: one `Item` for each, listed without decoding any.

Folders with captions beside the pictures or in metadata.jsonl, parquet files, webdataset tars, and
drawn scenes. Sources are only read. What is wrong with an item is said in it, not raised: one bad
picture among thousands is left out; only a source that cannot be meant raises.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from fluxjax.clip_reader import ANIMATED, import_av, is_animated, is_video
from fluxjax.config import ConfigError
from fluxjax.json_input import parse_json
from fluxjax.picture_files import EXTENSIONS
from fluxjax.train.data.archives import parquet_items, tar_items
from fluxjax.train.data.item import (
    MAX_BYTES,
    MAX_CAPTION_BYTES,
    Caption,
    Item,
    bad_item,
    file_stamp,
    read_caption,
    shown,
)
from fluxjax.train.data.settings import DataSettings

SCENES, EDITS = "scenes", "edits"
METADATA = "metadata.jsonl"


def list_items(settings: DataSettings) -> list[Item]:
    """Every item of the source, in an order that depends on names alone.

    Raises FileNotFoundError and ConfigError for a source that is none.
    """
    if settings.source in (SCENES, EDITS):
        from fluxjax.train.data.drawn_scenes import edit_items, scene_items

        return (scene_items if settings.source == SCENES else edit_items)(settings)
    path = Path(settings.source).expanduser()
    if path.is_dir():
        items = _folder_items(path, settings)
    elif not path.exists():
        raise FileNotFoundError(f"there is no data folder or file {path}")
    elif path.suffix == ".parquet":
        items = list(parquet_items(path, path.name, settings))
    elif path.suffix == ".tar":
        items = list(tar_items(path, path.name, settings))
    else:
        raise ConfigError(f"{path} is neither a folder nor a .parquet nor a .tar file")
    if not items:
        clips = path.is_dir() and any(map(is_video, walk(path, False)))
        more = "; it holds clips: say with data.frames how long they are" if clips else ""
        raise ConfigError(
            f"{path} holds no pictures{' and no clips' * bool(settings.frames)}{more}"
        )
    if any(item.is_clip and is_video(item.name) for item in items):
        import_av(path)
    return items


def _folder_items(root: Path, settings: DataSettings) -> list[Item]:
    if (root / METADATA).is_file():
        return list(_jsonl_items(root, settings))
    names = sorted(walk(root, settings.follow_links))
    kinds: dict[str, list[str]] = {"pictures": [], ".parquet": [], ".tar": []}
    links = []
    for name in names:
        extension = Path(name).suffix.lower()
        if name.endswith("/"):
            links.append(name)
        elif extension in EXTENSIONS or (settings.frames and is_video(name)):
            kinds["pictures"].append(name)
        elif extension in kinds:
            kinds[extension].append(name)
    found = [kind for kind, members in kinds.items() if members]
    if len(found) > 1:
        raise ConfigError(f"{root} holds {' and '.join(found)}: name a folder of one kind")
    items = [bad_item(name, "it is a link to a folder, see follow_links") for name in links]
    for name in kinds["pictures"]:
        items.append(picture_item(root, name, _caption_beside(root, name, settings), settings))
    readers = {".parquet": parquet_items, ".tar": tar_items}
    for kind, reader in readers.items():
        for name in kinds[kind]:
            if problem := _file_problem(root, name, settings.follow_links, largest=None):
                items.append(bad_item(name, problem))
            else:
                items.extend(reader(root / name, name, settings))
    return items


def walk(root: Path, follow_links: bool) -> Iterator[str]:
    """Names below `root`, hidden ones left out; a link to a folder that is not followed ends in /.

    Each real folder is entered once, so that links in a circle end.
    """
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=follow_links):
        real = os.path.realpath(folder)
        folders[:] = [f for f in folders if not f.startswith((".", "__MACOSX"))]
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        relative = Path(folder).relative_to(root)
        for name in folders:
            if not follow_links and os.path.islink(os.path.join(folder, name)):
                yield (relative / name).as_posix() + "/"
        for name in files:
            if not name.startswith("."):
                yield (relative / name).as_posix()


def _file_problem(
    root: Path, name: str, follow_links: bool, *, largest: int | None = MAX_BYTES
) -> str:
    """Why a file is not read: outside of the source, absent, or no ordinary file."""
    try:
        lexical = Path(os.path.normpath(name))
        if lexical.is_absolute() or lexical.parts[:1] == ("..",):
            return "it lies outside of the source"
        path = root / name
        if not follow_links and not path.resolve().is_relative_to(_resolved(root)):
            return "it is a link to a file outside of the source, see follow_links"
        status = path.stat()
    except FileNotFoundError:
        return "the file is missing"
    except (OSError, ValueError, RuntimeError) as error:  # no permission, NUL in a name, a circle
        return f"it cannot be opened ({getattr(error, 'strerror', None) or error})"
    if not stat.S_ISREG(status.st_mode):
        return "it is no ordinary file"
    if largest is not None and status.st_size > largest:
        return f"the file has {status.st_size / 2**30:.1f} GiB, more than is read"
    return ""


@functools.lru_cache(maxsize=8)
def _resolved(root: Path) -> Path:
    return root.resolve()


def _caption_beside(root: Path, name: str, settings: DataSettings) -> Caption:
    text = str(Path(name).with_suffix(settings.caption_extension))
    problem = _file_problem(root, text, settings.follow_links, largest=MAX_CAPTION_BYTES)
    if problem == "the file is missing":
        return read_caption(None, settings)
    if problem:
        return Caption("", f"its caption: {problem}")
    try:
        return read_caption((root / text).read_bytes(), settings)
    except OSError as error:
        return Caption("", f"its caption cannot be read ({error.strerror})")


def picture_item(root: Path, name: str, caption: Caption, settings: DataSettings) -> Item:
    """The file `name` below `root`, or why it cannot be used."""
    problem = _file_problem(root, name, settings.follow_links) or caption.problem
    if problem:
        return bad_item(name, problem)
    path = root / name
    may_move = max(settings.frames, default=1) > 1 and name.lower().endswith(ANIMATED)
    is_clip = is_video(name) or (may_move and is_animated(path))
    read = path.read_bytes
    return Item(shown(name), file_stamp(path), caption.text, "", read, is_clip=is_clip)


def _jsonl_items(root: Path, settings: DataSettings) -> Iterator[Item]:
    """Hugging Face's imagefolder: lines of {"file_name": ..., "text": ...}."""
    for number, line in enumerate((root / METADATA).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{METADATA} line {number}"
        try:
            row = parse_json(line.decode("utf-8-sig"))
        except ValueError as error:
            yield bad_item(where, f"it is not JSON in UTF-8 ({error})")
            continue
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            yield bad_item(where, "it has no file_name")
            continue
        caption = read_caption(row.get(settings.caption_key), settings)
        yield picture_item(root, name, caption, settings)
