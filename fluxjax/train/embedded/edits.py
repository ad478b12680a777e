"""Edits of drawn scenes: a scene, what is asked for, and the scene that is wanted.

One thing changes at a time: an object's colour, shape or size, whether it is there, or the
background. Objects stay where they are. An instruction names the object so that no other can be
meant; "it" is the only one there is, "them" are two or three that are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from fluxjax.train.embedded import phrases
from fluxjax.train.embedded.scenes import (
    BACKGROUNDS,
    COLOURS,
    EXTENT,
    LEAST_GAP,
    SHAPES,
    SIZES,
    Scene,
    is_legal,
)

CHANGES = ("colour", "shape", "size", "background", "removal")
_PROBABILITIES = (0.24, 0.16, 0.18, 0.16, 0.26)
_TRIES = 40
_RADII = np.array(list(SIZES.values()), np.float32)


class Edit(NamedTuple):
    """`before` and `after` have numpy fields without leading axis; `objects` of `before` change."""

    before: Scene
    after: Scene
    instruction: str
    change: str
    objects: tuple[int, ...]


def draw_edits(
    scenes: Scene, rng: np.random.Generator, *, width: int, height: int, held_out: bool | None
) -> list[Edit | None]:
    """An edit of each scene (numpy fields with a leading axis); None where none was found.

    `held_out` False: the wanted scene is one that training may show; None: either.
    """
    lengths = np.array([width, height]) / min(width, height)
    gap = LEAST_GAP / min(width, height)

    def one(scene: Scene) -> Edit | None:
        for _ in range(_TRIES):
            found = _propose(scene, rng)
            if found is None or not _fits(found.after, lengths, gap):
                continue
            if is_legal(found.after, held_out):
                return found
        return None

    return [one(Scene(*(field[i] for field in scenes))) for i in range(len(scenes.kind))]


def _propose(scene: Scene, rng: np.random.Generator) -> Edit | None:
    change = str(rng.choice(CHANGES, p=_PROBABILITIES))
    chosen = _choose(scene, rng)
    if change == "background":
        chosen = tuple(range(int(scene.count)))
    elif chosen is None or (change == "removal" and (len(chosen) > 1 or scene.count == 1)):
        return None
    after, said = _CHANGE[change](scene, chosen, rng)
    return None if after is None else Edit(scene, after, said, change, chosen)


def _choose(scene: Scene, rng: np.random.Generator) -> tuple[int, ...] | None:
    """One object that can be named, or all where they are alike."""
    count = int(scene.count)
    alike = len({(int(scene.shape[i]), int(scene.colour[i])) for i in range(count)}) == 1
    return tuple(range(count)) if alike else (int(rng.integers(count)),)


def _name(scene: Scene, objects: tuple[int, ...], rng: np.random.Generator) -> str:
    """Words that mean these objects and no other."""
    if len(objects) > 1:
        i = objects[0]
        return _pick(rng, ("them", f"the {_plural(_shape_word(scene.shape[i], rng))}"))
    i = next(iter(objects))
    count = int(scene.count)
    shape, colour = _shape_word(scene.shape[i], rng), _colour_word(scene.colour[i], rng)
    others = [j for j in range(count) if j != i]
    names = [f"the {colour} {shape}"]
    if not any(scene.shape[j] == scene.shape[i] for j in others):
        names += [f"the {shape}"] * 3
    if not any(scene.colour[j] == scene.colour[i] for j in others):
        names += [f"the {colour} one"] * bool(others)
    if not others:
        names += ["it"] * 2
    return _pick(rng, names)


def _recoloured(scene: Scene, objects: tuple[int, ...], rng: np.random.Generator):
    new = int(rng.integers(len(COLOURS)))
    if new == int(scene.colour[objects[0]]):
        return None, ""
    name, word = _name(scene, objects, rng), _colour_word(new, rng)
    said = _pick(
        rng,
        (
            f"make {name} {word}",
            f"make {name} {word}",
            f"turn {name} {word}",
            f"paint {name} {word}",
            f"change {name} to {word}",
        ),
    )
    return scene._replace(colour=_with(scene.colour, objects, new)), said


def _reshaped(scene: Scene, objects: tuple[int, ...], rng: np.random.Generator):
    new = int(rng.integers(len(SHAPES)))
    if new == int(scene.shape[objects[0]]):
        return None, ""
    name, word = _name(scene, objects, rng), _shape_word(new, rng)
    wanted = _plural(word) if len(objects) > 1 else f"a {word}"
    verb = _pick(rng, ("turn {} into {}", "make {} {}", "change {} to {}"))
    return scene._replace(shape=_with(scene.shape, objects, new)), verb.format(name, wanted)


def _resized(scene: Scene, objects: tuple[int, ...], rng: np.random.Generator):
    old = int(scene.size[objects[0]])
    new = int(rng.integers(len(SIZES)))
    if new == old:
        return None, ""
    name = _name(scene, objects, rng)
    words = ("larger", "bigger") if new > old else ("smaller",)
    # One size more or less is larger or smaller; the last ones have names of their own.
    said = [f"make {name} {word}" for word in words] if abs(new - old) == 1 else []
    if new != 1:
        said += [f"make {name} {word}" for word in phrases.SIZE_WORDS[new][:2]]
    if not said:
        return None, ""
    radius = _with(scene.radius, objects, _RADII[new])
    return scene._replace(size=_with(scene.size, objects, new), radius=radius), _pick(rng, said)


def _on_another_ground(scene: Scene, objects: tuple[int, ...], rng: np.random.Generator):
    new = int(rng.integers(len(BACKGROUNDS)))
    if not scene.split and new == int(scene.background[0]):
        return None, ""
    name = list(BACKGROUNDS)[new]
    word = _pick(rng, phrases.BACKGROUND_WORDS.get(name, (name,)))
    it = "it" if int(scene.count) == 1 else "them"
    said = _pick(
        rng,
        (
            f"put {it} on {word}",
            f"put {it} on {word}",
            f"put {it} on a {word} background",
            f"make the background {word}",
            f"change the background to {word}",
        ),
    )
    background = np.array([new, (new + 1) % len(BACKGROUNDS)], scene.background.dtype)
    return scene._replace(background=background, split=np.zeros_like(scene.split)), said


def _removed(scene: Scene, objects: tuple[int, ...], rng: np.random.Generator):
    name = _name(scene, objects, rng)
    verb = _pick(rng, ("remove {}", "remove {}", "delete {}", "erase {}", "take {} away"))
    left = [i for i in range(3) if i not in objects]
    order = np.array([*left, *objects])
    moved = {
        field: getattr(scene, field)[order]
        for field in ("shape", "colour", "size", "centre", "radius")
    }
    count = scene.count - np.asarray(len(objects), scene.count.dtype)
    moved["radius"] = np.where(np.arange(3) < count, moved["radius"], 0).astype(np.float32)
    # One object is a single one, two of a row are a pair.
    kind = np.asarray(0 if count == 1 else 1, scene.kind.dtype)
    return scene._replace(kind=kind, count=count, **moved), verb.format(name)


_CHANGE: dict[str, Callable[..., tuple[Scene | None, str]]] = {
    "colour": _recoloured,
    "shape": _reshaped,
    "size": _resized,
    "background": _on_another_ground,
    "removal": _removed,
}


def _fits(scene: Scene, lengths: np.ndarray, gap: float) -> bool:
    """Whether all objects lie inside the picture and apart."""
    count = int(scene.count)
    for i in range(count):
        extent = scene.radius[i] * EXTENT
        if (scene.centre[i] < extent).any() or (lengths - scene.centre[i] < extent).any():
            return False
    return all(
        np.linalg.norm(scene.centre[i] - scene.centre[j]) - scene.radius[i] - scene.radius[j] >= gap
        for i, j in _pairs(count)
    )


def _pairs(count: int) -> Iterator[tuple[int, int]]:
    return ((i, j) for i in range(count) for j in range(i))


def _with(values: Any, objects: tuple[int, ...], new: Any) -> np.ndarray:
    changed = np.array(values)
    changed[list(objects)] = new
    return changed


def _pick(rng: np.random.Generator, options: Any) -> str:
    return options[int(rng.integers(len(options)))]


def _colour_word(colour: Any, rng: np.random.Generator) -> str:
    name = list(COLOURS)[int(colour)]
    return _pick(rng, phrases.COLOUR_WORDS.get(name, (name,)))


def _shape_word(shape: Any, rng: np.random.Generator) -> str:
    name = SHAPES[int(shape)]
    return _pick(rng, phrases.SHAPE_WORDS.get(name, (name,)))


def _plural(word: str) -> str:
    return phrases.PLURALS.get(word, word + "s")
