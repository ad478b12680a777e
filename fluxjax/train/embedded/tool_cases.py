"""Cases for the embedded model's tools: what it is given, what is asked for, and what is right.

All show scenes that training holds out, from a stream of their own. A verdict has two sides: that
what was asked for is there, and that all else is as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from fluxjax.train.embedded.edits import Edit, draw_edits
from fluxjax.train.embedded.holes import hole
from fluxjax.train.embedded.phrasing import captions
from fluxjax.train.embedded.reader import Reading, ReadObject, read
from fluxjax.train.embedded.scenes import Scene, render, sample_scenes

ToolTask = Literal["edit", "fill", "canny"]
CANNY = (50, 200)
_STREAM = 0x0E0D17
_NEAR = 0.1  # of the shorter side: objects stay where they are
_AT_ONCE = 256
_EDGE = 2  # pixels by which an edge may be off
_GOOD_EDGES = 0.9  # share of the edges, both ways, that makes a picture right
_WITHIN = 1.25  # times the autoencoder's own error
Picture = Float[np.ndarray, "height width 3"]


class Verdict(NamedTuple):
    """Of a picture that a tool drew."""

    asked: bool
    """What was asked for is there."""
    kept: bool
    """All else is as it was (edit, fill); the edges are those of the control (canny)."""


class Cases(NamedTuple):
    """`pictures`: by what they are to a task, with `n` rows in [-1, 1]; `wanted`: what is right."""

    task: ToolTask
    prompts: list[str]
    pictures: dict[str, Float[np.ndarray, "n height width 3"]]
    wanted: Float[np.ndarray, "n height width 3"]
    edits: list[Edit]
    """Of canny, whose scenes change nothing, before and after are the same."""


def draw_cases(task: ToolTask, n: int, *, width: int, height: int, seed: int) -> Cases:
    """`n` cases of a tool, in (width, height) pixels; a seed draws the same ones."""
    size = {"width": width, "height": height}
    rng = np.random.default_rng((_STREAM, seed))
    edits: list[Edit] = []
    for chunk in range(8 * n):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(_STREAM), seed), chunk)
        drawn = sample_scenes(key, _AT_ONCE, held_out=True, **size)
        scenes = Scene(*(np.asarray(field) for field in drawn))
        edits += _EDITS[task](scenes, rng, size)
        if len(edits) >= n:
            break
    edits = edits[:n]
    before, after = (_rendered([getattr(e, name) for e in edits], **size) for name in _SIDES)
    pictures = {"reference": before}
    if task == "fill":
        masks = np.stack([hole(edit.before, edit.objects[0], rng, **size) for edit in edits])
        pictures = {"image": before, "mask": np.repeat(2.0 * masks[..., None] - 1, 3, axis=-1)}
    if task == "canny":
        pictures = {"control": np.stack([2.0 * edges(one)[..., None] - 1 for one in after])}
        pictures["control"] = np.repeat(pictures["control"], 3, axis=-1)
    pictures = {name: value.astype(np.float32) for name, value in pictures.items()}
    return Cases(task, [edit.instruction for edit in edits], pictures, after, edits)


_SIDES = ("before", "after")


def _edits(scenes: Scene, rng: np.random.Generator, size: Mapping[str, int]) -> list[Edit]:
    return [e for e in draw_edits(scenes, rng, held_out=None, **size) if e is not None]


def _fills(scenes: Scene, rng: np.random.Generator, size: Mapping[str, int]) -> list[Edit]:
    """Another object in the place of one, asked for by a caption of the whole."""
    found = [e for e in _edits(scenes, rng, size) if e.change in ("colour", "shape")]
    return _captioned([e for e in found if len(e.objects) == 1], rng)


def _same(scenes: Scene, rng: np.random.Generator, size: Mapping[str, int]) -> list[Edit]:
    each = [Scene(*(field[i] for field in scenes)) for i in range(len(scenes.kind))]
    return _captioned([Edit(scene, scene, "", "", ()) for scene in each], rng)


def _captioned(edits: list[Edit], rng: np.random.Generator) -> list[Edit]:
    if not edits:
        return []
    after = Scene(*map(np.stack, zip(*(edit.after for edit in edits), strict=True)))
    texts = captions(after, int(rng.integers(2**31)), "sentence")
    return [e._replace(instruction=said.text) for e, said in zip(edits, texts, strict=True)]


_EDITS = {"edit": _edits, "fill": _fills, "canny": _same}


def _rendered(scenes: list[Scene], *, width: int, height: int) -> np.ndarray:
    stacked = Scene(*map(np.stack, zip(*scenes, strict=True)))
    return np.asarray(render(stacked, width=width, height=height))


def edges(picture: Picture) -> Bool[np.ndarray, "height width"]:
    """White pixels of the picture's edges (OpenCV's Canny)."""
    from PIL import Image

    from fluxjax.sample.edges import canny_edges

    shown = Image.fromarray(np.round((np.clip(picture, -1, 1) + 1) * 127.5).astype(np.uint8))
    return np.asarray(canny_edges(shown, *shown.size, CANNY))[:, :, 0] > 127


def judge(cases: Cases, drawn: np.ndarray, rebuilt: np.ndarray) -> list[Verdict]:
    """Of each picture. `rebuilt`: what is right, through the autoencoder and back."""
    verdicts = {"edit": _judge_edit, "fill": _judge_fill, "canny": _judge_canny}[cases.task]
    return [verdicts(cases, i, drawn[i], rebuilt[i]) for i in range(len(drawn))]


def _judge_edit(cases: Cases, i: int, drawn: Picture, rebuilt: Picture) -> Verdict:
    edit, reading = cases.edits[i], read(drawn)
    after, count = edit.after, int(edit.after.count)
    found = _matched(after, reading)
    changed = range(count) if edit.change == "background" else edit.objects
    first, second = map(int, after.background)
    ground = (first, second if after.split else first)
    same_ground = reading.split == int(after.split) and reading.background == ground
    right = {
        field: [
            o is not None and getattr(o, field) == int(getattr(after, field)[j])
            for j, o in enumerate(found)
        ]
        for field in ("colour", "shape", "size")
    }
    all_there = len(reading.objects) == count and None not in found
    if edit.change == "removal":
        asked = len(reading.objects) == count and not any(
            _distance(o, edit.before.centre[edit.objects[0]]) < _NEAR for o in reading.objects
        )
        kept = same_ground and all(all(marks) for marks in right.values())
    elif edit.change == "background":
        asked = same_ground
        kept = all_there and all(all(marks) for marks in right.values())
    else:
        asked = all(right[edit.change][j] for j in changed)
        kept = (
            same_ground
            and all_there
            and all(
                marks[j]
                for field, marks in right.items()
                for j in range(count)
                if not (j in changed and field == edit.change)
            )
        )
    return Verdict(asked, kept)


def _matched(scene: Scene, reading: Reading) -> list[ReadObject | None]:
    """What is read where each object of the scene should be."""
    found: list[ReadObject | None] = []
    for j in range(int(scene.count)):
        near = min(reading.objects, key=lambda o: _distance(o, scene.centre[j]), default=None)
        found.append(None if near is None or _distance(near, scene.centre[j]) > _NEAR else near)
    return found


def _distance(found: ReadObject, centre: Any) -> float:
    return float(np.hypot(*(np.asarray(found.centre) - centre)))


def _judge_fill(cases: Cases, i: int, drawn: Picture, rebuilt: Picture) -> Verdict:
    edit = cases.edits[i]
    (j,) = edit.objects
    hole = cases.pictures["mask"][i, :, :, 0] > 0
    wanted = int(edit.after.colour[j]), int(edit.after.shape[j])
    # The caption does not say where in the hole it is.
    asked = any((o.colour, o.shape) == wanted and _inside(o, hole) for o in read(drawn).objects)
    # Pixels beside the hole lie under the same tokens, and change a little with it.
    outside = np.logical_not(ndimage.binary_dilation(hole, iterations=8))
    errors = [np.sqrt(np.square(p - cases.wanted[i])[outside].mean()) for p in (drawn, rebuilt)]
    return Verdict(asked, bool(errors[0] <= _WITHIN * errors[1]))


def _inside(found: ReadObject, hole: np.ndarray) -> bool:
    """Whether the middle of an object lies in the hole."""
    x, y = (int(v * min(hole.shape)) for v in found.centre)
    return bool(hole[min(y, len(hole) - 1), min(x, hole.shape[1] - 1)])


def _judge_canny(cases: Cases, i: int, drawn: Picture, rebuilt: Picture) -> Verdict:
    """The caption is followed, as far as a control leaves it open: in the colours."""
    edit = cases.edits[i]
    found = _matched(edit.after, read(drawn))
    asked = all(
        o is not None and o.colour == int(edit.after.colour[j]) for j, o in enumerate(found)
    )
    wanted, there = cases.pictures["control"][i, :, :, 0] > 0, edges(drawn)
    return Verdict(asked, min(_covered(wanted, there), _covered(there, wanted)) >= _GOOD_EDGES)


def _covered(these: np.ndarray, by: np.ndarray) -> float:
    """Share of these edges that lie near others."""
    near = ndimage.binary_dilation(by, np.ones((2 * _EDGE + 1, 2 * _EDGE + 1)))
    return float((these & near).sum() / max(these.sum(), 1))
