"""Pictures that go with those of a source, found by their names in a folder beside it.

References are what a picture is made from (training to edit), masks say where it counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fluxjax.config import ConfigError
from fluxjax.picture_files import EXTENSIONS
from fluxjax.train.data.item import Caption, Item, bad_item
from fluxjax.train.data.settings import DataSettings
from fluxjax.train.data.sources import picture_item, walk

Kind = Literal["reference", "mask"]
KINDS: tuple[Kind, ...] = ("reference", "mask")


def folder_of(kind: Kind, settings: DataSettings) -> str:
    """Where the companions of this kind are; empty if there are none."""
    return {"reference": settings.references, "mask": settings.masks}[kind]


def companion_items(kind: Kind, items: list[Item], settings: DataSettings) -> list[Item]:
    """For `dogs/1.jpg` of the source the picture `dogs/1` of the folder, whatever its extension.

    Raises FileNotFoundError, and ConfigError for a source that is no folder.
    """
    root = Path(folder_of(kind, settings)).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder of {kind}s {root}")
    if not Path(settings.source).expanduser().is_dir():
        raise ConfigError(
            f"{kind}s are found by the names of a folder's pictures, and the source "
            f"{settings.source} is no folder"
        )
    found: dict[str, list[str]] = {}
    for name in sorted(walk(root, settings.follow_links)):
        if Path(name).suffix.lower() in EXTENSIONS:
            found.setdefault(str(Path(name).with_suffix("")), []).append(name)

    def companion(item: Item) -> Item:
        names = found.get(str(Path(item.name).with_suffix("")), [])
        if len(names) != 1:
            listed = f"there are {' and '.join(names)}" if names else "there is none"
            return bad_item(item.name, f"it needs one {kind} of its name in {root}: {listed}")
        made = picture_item(root, names[0], Caption("", ""), settings)
        return made._replace(problem=made.problem and f"its {kind}: {made.problem}")

    return [companion(item) for item in items]
