"""Pictures that go with those of a source: in a folder beside it, or in its own archives.

References are what a picture is made from (training to edit), masks say where it counts, fill masks
what of it is painted anew, controls what it is shaped like. Fill masks may be drawn at random, and
controls be the pictures' own edges.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from fluxjax.config import ConfigError
from fluxjax.picture_files import EXTENSIONS
from fluxjax.train.data.item import Caption, Item, bad_item
from fluxjax.train.data.random_masks import draw_mask
from fluxjax.train.data.settings import CANNY, RANDOM, DataSettings
from fluxjax.train.data.sources import picture_item, walk

Kind = Literal["reference", "mask", "fill_mask", "control"]
KINDS: tuple[Kind, ...] = ("reference", "mask", "fill_mask", "control")
OF_ITS_SIZE: tuple[Kind, ...] = ("mask", "fill_mask")


def place_of(kind: Kind, settings: DataSettings) -> str:
    """Where the companions of this kind are; empty if there are none, or none in files."""
    place = {
        "reference": settings.references,
        "mask": settings.masks,
        "fill_mask": settings.fill_masks,
        "control": settings.controls,
    }[kind]
    made = {"fill_mask": RANDOM, "control": CANNY}.get(kind)
    return "" if place == made else place


def companion_items(kind: Kind, items: list[Item], settings: DataSettings) -> list[Item]:
    """For `dogs/1.jpg` of the source the picture `dogs/1` of the folder, whatever its extension;
    or what lies in an archive beside each.

    Raises FileNotFoundError, and ConfigError for a source that has no such companions.
    """
    place = place_of(kind, settings)
    # As of masks to draw with: strokes on nothing are the strokes.
    ground = "black" if kind in OF_ITS_SIZE else "white"
    if any(item.beside for item in items):
        return [_beside(kind, place, item)._replace(ground=ground) for item in items]
    root = Path(place).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder of {words(kind)}s {root}")
    if not Path(settings.source).expanduser().is_dir():
        raise ConfigError(
            f"{words(kind)}s are found by the names of a folder's pictures, and the source "
            f"{settings.source} is no folder"
        )
    found: dict[str, list[str]] = {}
    for name in sorted(walk(root, settings.follow_links)):
        if Path(name).suffix.lower() in EXTENSIONS:
            found.setdefault(_stem(name), []).append(name)

    def companion(item: Item) -> Item:
        names = found.get(_stem(item.name), [])
        if len(names) != 1:
            listed = f"there are {' and '.join(names)}" if names else "there is none"
            needs = f"it needs one {words(kind)} of its name in {root}"
            return bad_item(item.name, f"{needs}: {listed}")
        made = picture_item(root, names[0], Caption("", ""), settings)
        return made._replace(problem=made.problem and f"its {words(kind)}: {made.problem}")

    return [companion(item)._replace(ground=ground) for item in items]


def _beside(kind: Kind, place: str, item: Item) -> Item:
    if item.beside is None or item.problem:
        return bad_item(item.name, item.problem or "it is damaged")
    found = item.beside(place)
    return found._replace(problem=found.problem and f"its {words(kind)}: {found.problem}")


def _stem(name: str) -> str:
    """Without its extension; accents are written as on every disk, of which some set them apart."""
    return unicodedata.normalize("NFC", str(Path(name).with_suffix("")))


def words(kind: Kind) -> str:
    """What companions of this kind are, for people."""
    return kind.replace("_", " ")


def random_mask_items(digest: str, name: str, size: tuple[int, int], settings: DataSettings):
    """The masks that are drawn for one picture, by the rule."""
    rule = settings.random_masks
    for number in range(rule.each):
        mask = rule.digest(digest, number)
        read = partial(draw_mask, rule, mask, *size)
        yield Item(f"mask {number} of {name}", "drawn", "", "", read, mask, size)


def canny_item(
    digest: str,
    name: str,
    read: Callable[[], np.ndarray],
    size: tuple[int, int],
    thresholds: tuple[int, int],
) -> Item:
    """The edges of one picture; `read` gives it at its size, in [-1, 1]."""
    edges = hashlib.sha256(f"{thresholds} {digest}".encode()).hexdigest()
    made = partial(_edges, read, size, thresholds)
    return Item(f"the edges of {name}", "drawn", "", "", made, edges, size)


def _edges(
    read: Callable[[], np.ndarray], size: tuple[int, int], thresholds: tuple[int, int]
) -> np.ndarray:
    from PIL import Image

    from fluxjax.sample.edges import canny_edges

    shown = np.round((np.clip(read(), -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.asarray(canny_edges(Image.fromarray(shown), *size, thresholds))
