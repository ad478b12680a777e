"""Reads a drawn scene back from its pixels, and scores it against what its caption says.

The opposite of `scenes.render`, for pictures that a network drew: blur, colour noise and ragged
edges are expected. No network is involved, so it measures networks.
"""

from __future__ import annotations

from functools import cache
from itertools import permutations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage

from fluxjax.train.embedded.phrasing import Caption
from fluxjax.train.embedded.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    unit_distances,
)

# Lengths are in units of the shorter side, colours in [-1, 1].
SMALLEST_AREA = 0.0065  # 60 pixels of 96 x 96; the smallest drawn object has 240
CONTRAST = 0.3  # pink on beige, the weakest pair, is 0.69 apart; noise at 30 dB has length 0.11
PLAIN_FIT = 0.82  # whole shapes overlap their template by more than this
WORST_FIT = 0.6  # below this overlap a blob has none of the shapes
GRID = 36  # templates are GRID x GRID, two square roots of the object's area wide
_UPRIGHT = tuple(np.linspace(-0.2, 0.2, 7))  # scenes turn objects by up to 0.14
_SCALES = (0.95, 1.0, 1.05)
_COLOURS = np.array(list(COLOURS.values()), np.float32) / 127.5 - 1
_BACKGROUNDS = np.array(list(BACKGROUNDS.values()), np.float32) / 127.5 - 1
_RADII = np.array(list(SIZES.values()))
ATTRIBUTES = ("colour", "shape", "size", "count", "relation", "background", "all")

Mask = Bool[np.ndarray, "height width"]
Picture = Float[np.ndarray, "height width 3"]


class ReadObject(NamedTuple):
    """`shape` is -1 when the pixels resemble none; `fit` is the overlap with the best template, and
    `angle` its turn clockwise, in radians."""

    shape: int
    colour: int
    size: int
    centre: tuple[float, float]
    radius: float
    fit: float
    angle: float = 0.0


class Reading(NamedTuple):
    """Objects, largest first; `background` and `split` as in `Scene` (plain: twice the same)."""

    objects: tuple[ReadObject, ...]
    background: tuple[int, int]
    split: int

    @property
    def kind(self) -> str:
        """One of KINDS, or "none" for an empty or crowded picture."""
        count = len(self.objects)
        if count not in (1, 2, 3):
            return "none"
        if count == 1:
            return "single"
        alike = len({(o.shape, o.colour) for o in self.objects}) == 1
        return "count" if alike else "pair" if count == 2 else "row"


class Tally(NamedTuple):
    """How many of the things asked for are right."""

    right: int
    asked: int


class Templates(NamedTuple):
    """Turned and scaled shapes that blobs are held against.

    A picture has its centroid in the middle and, before `_SCALES`, area 1. `areas` are those of all
    unit shapes.
    """

    pictures: Float[np.ndarray, "t pixels"]
    shapes: Int[np.ndarray, "t"]
    angles: Float[np.ndarray, "t"]
    centroids: Float[np.ndarray, "t 2"]
    areas: Float[np.ndarray, "shapes"]


@cache
def templates(angles: tuple[float, ...] = _UPRIGHT, among: tuple[str, ...] = SHAPES) -> Templates:
    """Of the shapes `among` all, turned clockwise by each of the angles."""
    distances = jax.jit(unit_distances)
    fine = jnp.linspace(-1.5, 1.5, 401)
    x, y = np.meshgrid(fine, fine)
    inside = np.stack(distances(jnp.asarray(x), jnp.asarray(y))) < 0
    areas = inside.mean((1, 2)) * 9
    centroids = np.stack([(x[mask].mean(), y[mask].mean()) for mask in inside])
    # Axes: angle, scale, shape, row, column.
    turns = np.asarray(angles)[:, None, None, None, None]
    units = np.sqrt(areas) / np.asarray(_SCALES)[:, None]
    cells = (np.arange(GRID) + 0.5) / GRID * 2 - 1
    gy, gx = np.meshgrid(cells, cells, indexing="ij")
    gx, gy = (units[None, :, :, None, None] * g for g in (gx, gy))
    c, s = np.cos(turns), np.sin(turns)
    cx, cy = (centroids[:, axis, None, None] for axis in (0, 1))
    at = distances(jnp.asarray(c * gx + s * gy + cx), jnp.asarray(c * gy - s * gx + cy))
    distance = np.stack([np.asarray(d)[:, :, i] for i, d in enumerate(at)], axis=2)
    pictures = np.clip(0.5 - distance * GRID / (2 * units[None, :, :, None, None]), 0, 1)
    turned = np.stack([c * cx - s * cy, s * cx + c * cy], -1)[:, :, :, 0, 0]
    shape = (len(angles), len(_SCALES), len(areas))
    every = Templates(
        pictures.reshape(-1, GRID * GRID).astype(np.float32),
        np.broadcast_to(np.arange(len(areas)), shape).ravel(),
        np.broadcast_to(np.asarray(angles)[:, None, None], shape).ravel(),
        np.broadcast_to(turned, (*shape, 2)).reshape(-1, 2),
        areas,
    )
    meant = np.isin(every.shapes, [SHAPES.index(name) for name in among])
    return every._replace(
        pictures=every.pictures[meant],
        shapes=every.shapes[meant],
        angles=every.angles[meant],
        centroids=every.centroids[meant],
    )


def _nearest(
    pixels: Float[np.ndarray, "*n 3"], palette: Float[np.ndarray, "k 3"]
) -> Int[np.ndarray, "*n"]:
    return (np.square(palette).sum(-1) - 2 * (pixels @ palette.T)).argmin(-1)


def _background(picture: Picture) -> tuple[tuple[int, int], int, Picture, Mask]:
    """(colours, split, picture without objects, where two colours may blend)."""
    height, width, _ = picture.shape
    label = _nearest(picture, np.concatenate([_BACKGROUNDS, _COLOURS]))
    y, x = np.mgrid[:height, :width] + 0.5
    sides = (np.zeros((height, width), bool), y > height / 2, x > width / 2)

    def votes(where: Mask) -> np.ndarray:
        return np.bincount(label[where], minlength=len(BACKGROUNDS))[: len(BACKGROUNDS)]

    counts = [(votes(~side), votes(side)) for side in sides]
    agreement = np.array([first.max() + second.max() for first, second in counts])
    # A split must explain clearly more than one colour does; two halves always explain a bit more.
    agreement[0] *= 1.1
    split = int(agreement.argmax())
    first, second = (int(c.argmax()) for c in counts[split])
    second = first if split == 0 else second
    back = np.empty_like(picture)
    for part, colour in ((~sides[split], first), (sides[split], second)):
        own = part & (label == colour)
        # The picture's own shade; the palette's if it has none.
        back[part] = np.median(picture[own], axis=0) if own.any() else _BACKGROUNDS[colour]
    seam = np.zeros((height, width), bool)
    if split:
        seam = np.abs(y - height / 2 if split == 1 else x - width / 2) < 3
    return (first, second), split, back, seam


def _distance(picture: Picture, back: Picture, seam: Mask) -> np.ndarray:
    """How far each pixel is from the background; at the seam, from any blend of both colours.

    Gray is such a blend of white and black: beside an object the seam is no excuse.
    """
    distance = np.linalg.norm(picture - back, axis=-1)
    if seam.any():
        a, b = back[0, 0], back[-1, -1]
        along = np.clip((picture - a) @ (b - a) / max(np.square(b - a).sum(), 1e-6), 0, 1)
        blend = np.linalg.norm(picture - a - along[..., None] * (b - a), axis=-1)
        across = np.ones((1, 7) if not seam[:, 0].any() else (7, 1), bool)
        beside = ndimage.binary_dilation((distance > CONTRAST) & ~seam, across)
        distance = np.where(seam & np.logical_not(beside), np.minimum(distance, blend), distance)
    return distance


def _fit(
    opacity: Float[np.ndarray, "height width"], side: int, colour: int, among: Templates
) -> ReadObject:
    """The shape that overlaps an object's opacity best, at the same area and centroid."""
    area = opacity.sum()
    y, x = np.nonzero(opacity)
    weight = opacity[y, x]
    cx, cy = (weight * x).sum() / area, (weight * y).sum() / area
    cells = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * np.sqrt(area)
    rows, columns = np.meshgrid(cells + cy, cells + cx, indexing="ij")
    seen = ndimage.map_coordinates(opacity, [rows, columns], order=1, mode="constant").ravel()
    pictures, shapes, angles, centroids, areas = among
    seen = seen.astype(np.float32)
    best = int((np.square(pictures).sum(-1) - 2 * (pictures @ seen)).argmin())
    fit = np.minimum(pictures[best], seen).sum() / np.maximum(pictures[best], seen).sum()
    shape = int(shapes[best])
    radius = np.sqrt(area / areas[shape])
    centre = (np.array([cx, cy]) + 0.5 - centroids[best] * radius) / side
    size = int(np.abs(np.log(radius / side / _RADII)).argmin())
    shown = shape if fit >= WORST_FIT else -1
    where = float(centre[0]), float(centre[1])
    found = float(radius / side), float(fit), float(angles[best])
    return ReadObject(shown, colour, size, where, *found)


def _parts(mask: Mask, smallest: float) -> list[Mask]:
    """Components of at least `smallest` pixels."""
    labels: Any = np.empty(mask.shape, np.int32)
    ndimage.label(mask, output=labels)
    sizes = np.bincount(labels.ravel())
    return [labels == i for i in range(1, len(sizes)) if sizes[i] >= smallest]


def _cut(mask: Mask, smallest: float) -> list[Mask]:
    """A component at its waists: erode until it falls apart, then give pixels to the nearer."""
    eroded = mask
    while eroded.any():
        eroded = ndimage.binary_erosion(eroded)
        seeds = _parts(eroded, smallest / 4)
        if len(seeds) > 1:
            away: list[Any] = [ndimage.distance_transform_edt(~seed) for seed in seeds]
            nearest = np.stack(away).argmin(0)
            return [mask & (nearest == i) for i in range(len(seeds))]
    return [mask]


def _objects(
    mask: Mask, opacity: np.ndarray, side: int, colour: int, among: Templates
) -> list[ReadObject]:
    """The object that a component shows, or the two or three that touch in it."""
    smallest = SMALLEST_AREA * side**2

    def fit(part: Mask, other: Mask) -> ReadObject:
        around = ndimage.binary_dilation(part) & ~other
        return _fit(np.where(around, opacity, 0.0), side, colour, among)

    whole = fit(mask, np.zeros_like(mask))
    if whole.fit < PLAIN_FIT:
        pieces = _cut(mask, smallest)
        if len(pieces) > 1 and min(piece.sum() for piece in pieces) >= smallest:
            cut = [fit(piece, mask & ~piece) for piece in pieces]
            if min(o.fit for o in cut) > max(whole.fit, 0.9 * PLAIN_FIT):
                return cut
    return [whole]


def read(picture: Picture, among: Templates | None = None) -> Reading:
    """Read a picture in [-1, 1], of any size, back into objects and background.

    `among`: the shapes that it may show, by default all of them upright.
    """
    among = templates() if among is None else among
    shrink = max(min(picture.shape[:2]) // 96, 1)
    if shrink > 1:
        height, width = (n // shrink for n in picture.shape[:2])
        cropped = picture[: height * shrink, : width * shrink]
        picture = cropped.reshape(height, shrink, width, shrink, 3).mean((1, 3))
    side = min(picture.shape[:2])
    smallest = SMALLEST_AREA * side**2
    colours, split, back, seam = _background(picture)
    nearest = _nearest(picture, _COLOURS)
    objects: list[ReadObject] = []
    for blob in _parts(_distance(picture, back, seam) > CONTRAST, smallest):
        # Rims are blends and look like colours that are not there: only what is thick votes.
        inner = np.stack([blob & (nearest == colour) for colour in range(len(COLOURS))])
        inner = ndimage.binary_erosion(inner, np.ones((1, 3, 3)))
        votes = inner.sum((1, 2))
        present = np.flatnonzero(votes >= max(smallest / 4, 0.08 * votes.sum()))
        if not len(present):
            continue
        shades = np.stack([np.median(picture[inner[colour]], axis=0) for colour in present])
        own = _nearest(picture, shades)
        for i, (colour, shade) in enumerate(zip(present, shades, strict=True)):
            span = shade - back
            # A shade may be the other half's background, where nothing of it can be seen.
            opacity = ((picture - back) * span).sum(-1) / np.maximum(np.square(span).sum(-1), 1e-6)
            opacity = np.where(own == i, np.clip(opacity, 0.0, 1.0), 0.0)
            for part in _parts(blob & (opacity > 0.5), smallest):
                # A rim two or three pixels wide is no object; the thinnest ring keeps half.
                if ndimage.binary_erosion(part).sum() > 0.3 * part.sum():
                    objects += _objects(part, opacity, side, int(colour), among)
    objects.sort(key=lambda o: -o.radius)
    return Reading(tuple(objects), colours, split)


def read_relation(first: ReadObject, second: ReadObject) -> int:
    """Index into RELATIONS: how `first` stands to `second`, by the longer of the two distances."""
    dx, dy = (a - b for a, b in zip(first.centre, second.centre, strict=True))
    name = ("left of", "right of")[dx > 0] if abs(dx) > abs(dy) else ("above", "below")[dy > 0]
    return RELATIONS.index(name)


def score(scene: Scene, caption: Caption, reading: Reading) -> dict[str, Tally]:
    """What a picture got right of what its caption states, by attribute.

    `scene` has numpy fields without leading axis. Colour, shape and size are counted by object (a
    missing object is wrong in each), count, relation, background and all once per picture. What
    the caption leaves open is not asked (asked = 0).
    """
    count = int(scene.count)
    wanted = range(count)
    found: list[ReadObject | None] = [*reading.objects[:6], *[None] * count]

    def right(i: int, o: ReadObject | None) -> tuple[bool, bool, bool]:
        if o is None:
            return False, False, False
        wished = (scene.colour[i], scene.shape[i], scene.size[i])
        colour, shape, size = map(int, wished)
        return o.colour == colour, o.shape == shape, o.size == size

    def worth(chosen: tuple[ReadObject | None, ...]) -> float:
        # Colour is what is read most surely; size only breaks ties, and never where unstated.
        return sum(
            1.1 * colour + shape + 0.3 * (size and caption.states_size[i])
            for i, (colour, shape, size) in enumerate(map(right, wanted, chosen))
        )

    matched = max(permutations(found, count), key=worth)
    marks = [right(i, o) for i, o in zip(wanted, matched, strict=True)]
    sized = [i for i in wanted if caption.states_size[i]]
    tallies = {
        "colour": Tally(sum(m[0] for m in marks), count),
        "shape": Tally(sum(m[1] for m in marks), count),
        "size": Tally(sum(marks[i][2] for i in sized), len(sized)),
        "count": Tally(int(len(reading.objects) == count), 1),
        "relation": Tally(0, 0),
        "background": Tally(0, 0),
    }
    if caption.relations:
        a, b = matched
        good = a is not None and b is not None and read_relation(a, b) in caption.relations
        tallies["relation"] = Tally(int(good), 1)
    if caption.states_background:
        split = int(scene.split)
        colours = tuple(int(i) for i in scene.background)
        colours = colours if split else (colours[0],) * 2
        good = reading.split == split and reading.background == colours
        tallies["background"] = Tally(int(good), 1)
    everything = all(right == asked for right, asked in tallies.values())
    return {**tallies, "all": Tally(int(everything), 1)}
