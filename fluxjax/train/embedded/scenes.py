"""Drawn scenes: coloured shapes as signed distance functions.

A scene holds one to three objects on a plain or two-coloured background. `sample_scenes` draws the
attributes, `render` the picture (both jitted). Lengths are measured in units of the picture's
shorter side, y points down.

Some colour-shape pairs and some pairs of shapes are held out: training never shows them, and
`sample_scenes(..., held_out=True)` shows nothing else.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray

from fluxjax.train.embedded.colours import BACKGROUNDS, COLOURS

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
SIZES = {"small": 0.125, "medium": 0.17, "large": 0.225}
RELATIONS = ("left of", "right of", "above", "below")
SPLITS = ("plain", "top and bottom", "left and right")
KINDS = ("single", "pair", "count", "row")
KIND_PROBABILITIES = (0.28, 0.42, 0.2, 0.1)

# (colour, shape) and unordered (shape, shape) that training never shows.
HELD_OUT_OBJECTS = (
    ("red", "heart"),
    ("orange", "cross"),
    ("yellow", "ring"),
    ("green", "star"),
    ("cyan", "triangle"),
    ("blue", "diamond"),
    ("purple", "square"),
    ("pink", "circle"),
    ("white", "cross"),
    ("black", "ring"),
    ("gray", "heart"),
)
HELD_OUT_PAIRS = (("star", "ring"), ("heart", "square"), ("cross", "circle"))

# Pixels between the places where an object's centre may lie, so that there are fewer pictures to
# learn: 4, and 8 where the shorter side has at least 128.
GRID, COARSE_GRID, COARSE_SIDE = 4, 8, 128
LEAST_GAP = 2  # pixels between two objects
EXTENT = 1.08  # the widest shape reaches this many radii from its centre
_PALETTE = np.array(list(COLOURS.values()), np.float32) / 127.5 - 1
_BACKGROUND_PALETTE = np.array(list(BACKGROUNDS.values()), np.float32) / 127.5 - 1
_RADII = np.array(list(SIZES.values()), np.float32)


def _held_out_tables() -> tuple[np.ndarray, np.ndarray]:
    names = list(COLOURS)
    objects = np.zeros((len(COLOURS), len(SHAPES)), bool)
    for colour, shape in HELD_OUT_OBJECTS:
        objects[names.index(colour), SHAPES.index(shape)] = True
    pairs = np.zeros((len(SHAPES), len(SHAPES)), bool)
    for a, b in HELD_OUT_PAIRS:
        i, j = SHAPES.index(a), SHAPES.index(b)
        pairs[i, j] = pairs[j, i] = True
    return objects, pairs


_OBJECT_HELD_OUT, _PAIR_HELD_OUT = _held_out_tables()
# Row: colour, column: background; an object in its background's colour could not be seen.
_UNSEEN = np.array([[colour == back for back in BACKGROUNDS] for colour in COLOURS])
Field = Array | np.ndarray
_CHUNKS = (64, 512)


class Scene(NamedTuple):
    """Attributes of one scene (or, with a leading axis, of many); unused objects have radius 0.

    `kind` indexes KINDS, `relation` RELATIONS (object 0 stands so to object 1), `split` SPLITS.
    """

    kind: Field  # int
    count: Field  # int, 1 to 3
    shape: Field  # int (3,)
    colour: Field  # int (3,)
    size: Field  # int (3,)
    relation: Field  # int
    centre: Field  # float (3, 2), x and y
    radius: Field  # float (3,)
    background: Field  # int (2,)
    split: Field  # int


def _attributes(key: PRNGKeyArray) -> tuple[Array, ...]:
    """One draw of the discrete attributes."""
    keys = jax.random.split(key, 9)
    kind = jax.random.choice(keys[0], len(KINDS), p=jnp.array(KIND_PROBABILITIES))
    many = jax.random.randint(keys[1], (), 2, 4)
    count = jnp.array([1, 2, 0, 3])[kind] + jnp.where(kind == 2, many, 0)
    shape = jax.random.randint(keys[2], (3,), 0, len(SHAPES))
    colour = jax.random.randint(keys[3], (3,), 0, len(COLOURS))
    size = jax.random.randint(keys[4], (3,), 0, len(SIZES))
    size = jnp.where((kind == 2) & (count == 3), jnp.minimum(size, 1), size)
    same = kind == 2
    shape, colour, size = (jnp.where(same, v[0], v) for v in (shape, colour, size))
    size = jnp.where(kind == 3, 0, size)
    relation = jax.random.randint(keys[5], (), 0, 4)
    first = jax.random.randint(keys[6], (), 0, len(BACKGROUNDS))
    second = (first + jax.random.randint(keys[7], (), 1, len(BACKGROUNDS))) % len(BACKGROUNDS)
    split = jax.random.choice(keys[8], 3, p=jnp.array([0.7, 0.15, 0.15]))
    return kind, count, shape, colour, size, relation, jnp.stack([first, second]), split


def _verdict(draw: tuple[Array, ...], held_out: bool | Array) -> Array:
    """Whether a draw is legal, and on the wanted side of the held-out line."""
    kind, count, shape, colour, _, _, background, split = draw
    used = jnp.arange(3) < count
    object_out = jnp.any(used & jnp.asarray(_OBJECT_HELD_OUT)[colour, shape])
    mixed = (kind == 1) | (kind == 3)
    i, j = jnp.array([0, 0, 1]), jnp.array([1, 2, 2])
    both = used[i] & used[j] & mixed
    pair_out = jnp.any(both & jnp.asarray(_PAIR_HELD_OUT)[shape[i], shape[j]])
    twins = jnp.any(both & (shape[i] == shape[j]) & (colour[i] == colour[j]))
    hides = jnp.asarray(_UNSEEN)[colour[:, None], background[None]]  # (object, background)
    unseen = jnp.any(used[:, None] & hides & (jnp.arange(2) <= split)[None])
    return ~twins & ~unseen & ((object_out | pair_out) == held_out)


def is_legal(scene: Scene, held_out: bool | None) -> bool:
    """`_verdict` of one finished scene (numpy fields without leading axis); None: either side."""
    used = range(int(scene.count))
    shape, colour = ([int(v) for v in field] for field in (scene.shape, scene.colour))
    grounds = [int(ground) for ground in scene.background[: 1 + (int(scene.split) > 0)]]
    if any(_UNSEEN[colour[i], ground] for i in used for ground in grounds):
        return False
    pairs = [(i, j) for i in used for j in range(i)]
    twins = any(shape[i] == shape[j] and colour[i] == colour[j] for i, j in pairs)
    if twins and KINDS[int(scene.kind)] != "count":
        return False
    out = any(_OBJECT_HELD_OUT[colour[i], shape[i]] for i in used)
    out = out or any(_PAIR_HELD_OUT[shape[i], shape[j]] for i, j in pairs)
    return held_out is None or out == held_out


def _spread(key: PRNGKeyArray, extents: Array, used: Array, length: Array) -> Array:
    """Centres of objects laid one after the other on a line of `length` with random gaps."""
    widths = jnp.where(used, 2 * extents, 0.0)
    slack = jnp.maximum(length - widths.sum(), 0.0)
    gaps = jax.random.dirichlet(key, jnp.full(4, 1.5)) * slack
    # Gaps between objects are never nothing: a fifth of the slack is shared out evenly.
    gaps = 0.8 * gaps + 0.2 * slack / 4
    gaps = jnp.where(used.sum() == 1, jnp.array([gaps[0] + gaps[1], 0.0, 0.0, 0.0]), gaps)
    starts = jnp.cumsum(gaps[:3]) + jnp.cumsum(widths) - widths
    return starts + widths / 2


def _place(
    key: PRNGKeyArray, draw: tuple[Array, ...], lengths: Array, grid: Array
) -> tuple[Array, Array]:
    kind, count, _, _, size, relation = draw[:6]
    keys = jax.random.split(key, 3)
    used = jnp.arange(3) < count
    radius = jnp.where(used, jnp.asarray(_RADII)[size], 0)
    extents = radius * EXTENT
    random_axis = jax.random.randint(keys[0], (), 0, 2)
    # Pairs follow their relation, rows go from left to right, the others as they like.
    axis = jnp.where(kind == 1, (relation >= 2).astype(int), jnp.where(kind == 3, 0, random_axis))
    along, across = lengths[axis], lengths[1 - axis]
    # Three medium objects do not fit on one line: the third takes a line of its own.
    stacked = (kind == 2) & (count == 3) & (size[0] > 0)
    on_line = used & ~(stacked & (jnp.arange(3) == 2))
    line = _spread(keys[1], extents, on_line, along)
    swap = (kind == 1) & ((relation == 1) | (relation == 3))  # object 0 stands right of or below 1
    mirrored = along - line
    line = jnp.where(swap, mirrored, line)
    u = jax.random.uniform(keys[2], (3,), minval=-1.0, maxval=1.0)
    room = jnp.maximum(across / 2 - extents, 0.0)
    single = count == 1
    offset = across / 2 + u * jnp.where(single, room, jnp.minimum(room, 0.09))
    rows = jnp.where(jnp.arange(3) == 2, 0.75, 0.25) * across
    third = (line[0] + line[1]) / 2 + u[2] * 0.1
    line = jnp.where(stacked & (jnp.arange(3) == 2), third, line)
    offset = jnp.where(stacked, rows + 0.03 * u, offset)
    centre = jnp.where(axis == 0, jnp.stack([line, offset], -1), jnp.stack([offset, line], -1))
    return _snap(centre, extents, lengths, grid), radius


def _snap(centre: Array, extents: Array, lengths: Array, grid: Array) -> Array:
    """The nearest points of the grid at which the objects lie inside the picture."""
    least = jnp.ceil(extents[:, None] / grid) * grid
    most = jnp.floor((lengths[None] - extents[:, None]) / grid) * grid
    return jnp.clip(jnp.round(centre / grid) * grid, least, jnp.maximum(most, least))


def _least_gap(centre: Array, radius: Array, count: Array) -> Array:
    """Between the circles around any two of the objects."""
    i, j = jnp.array([0, 0, 1]), jnp.array([1, 2, 2])
    gaps = jnp.linalg.norm(centre[i] - centre[j], axis=-1) - radius[i] - radius[j]
    return jnp.min(jnp.where(j < count, gaps, jnp.inf))


def sample_scenes(
    key: PRNGKeyArray,
    n: int,
    *,
    width: int | Array,
    height: int | Array,
    held_out: bool | Array = False,
) -> Scene:
    """Draw `n` scenes for pictures of `width` x `height` pixels (leading axis n on every field).

    Scene i depends on `key` and i alone: they are drawn in chunks, of which two sizes compile.
    """
    chunk = next((size for size in _CHUNKS if n <= size), _CHUNKS[-1])
    keys = jax.random.split(key, (-(-n // chunk), chunk))
    parts = [_scenes(row, width, height, held_out) for row in keys]
    return Scene(*(jnp.concatenate(values)[:n] for values in zip(*parts, strict=True)))


@jax.jit
def _scenes(
    keys: Key[Array, "n"], width: int | Array, height: int | Array, held_out: bool | Array
) -> Scene:
    side = jnp.minimum(width, height)
    lengths = jnp.stack([width, height]) / side
    grid = jnp.where(side < COARSE_SIDE, GRID, COARSE_GRID) / side

    def one(key: PRNGKeyArray) -> Scene:
        attributes, place = jax.random.split(key)
        draws = jax.vmap(_attributes)(jax.random.split(attributes, 64))
        good = jax.vmap(lambda *draw: _verdict(draw, held_out))(*draws)
        # With 64 tries the first good one exists but for one scene in 10^4 (held out); that scene
        # is then a legal training scene.
        draw = tuple(v[jnp.argmax(good)] for v in draws)
        kind, count, shape, colour, size, relation, background, split = draw
        tries = jax.vmap(lambda key: _place(key, draw, lengths, grid))(jax.random.split(place, 16))
        apart = jax.vmap(_least_gap)(*tries, jnp.broadcast_to(count, 16)) >= LEAST_GAP / side
        centre, radius = (v[jnp.argmax(apart)] for v in tries)
        return Scene(kind, count, shape, colour, size, relation, centre, radius, background, split)

    return jax.vmap(one)(keys)


# How often each attribute of a scene that is told otherwise is drawn anew.
_RETOLD = {"shape": 0.6, "colour": 0.3, "relation": 0.3, "background": 0.15}


def shows(scenes: Scene, colours: Collection[str]) -> np.ndarray:
    """Whether an object of each scene (leading axis n) has one of these colours."""
    names = [list(COLOURS).index(colour) for colour in colours]
    used = np.arange(3) < np.asarray(scenes.count)[:, None]
    return np.any(np.isin(np.asarray(scenes.colour), names) & used, axis=-1)


def tell_otherwise(
    scenes: Scene, rng: np.random.Generator, share: float, without: Collection[str] = ()
) -> Scene:
    """What captions may say of a `share` of `scenes` that their pictures do not show: other shapes,
    colours, relations and backgrounds, never what is held out. Fields of the others are kept.
    Scenes that show a colour of `without` are told as they are, and the colours told are others.
    """
    told = Scene(*(np.array(field) for field in scenes))
    choices = {
        "shape": np.arange(len(SHAPES)),
        "colour": np.array([i for i, name in enumerate(COLOURS) if name not in without]),
        "relation": np.arange(len(RELATIONS)),
        "background": np.arange(len(BACKGROUNDS)),
    }
    otherwise = (rng.random(len(told.kind)) < share) & ~shows(scenes, without)
    for i in np.flatnonzero(otherwise):
        before = Scene(*(np.asarray(field)[i] for field in scenes))
        after = {}
        for name, values in choices.items():
            old = getattr(before, name)
            anew = rng.random(old.shape) < _RETOLD[name]
            new = np.where(anew, rng.choice(values, size=old.shape), old)
            same = KINDS[int(before.kind)] == "count" and name in ("shape", "colour")
            after[name] = np.full_like(new, new[0]) if same else new
        scene = before._replace(**after)
        alike = int(scene.split) > 0 and scene.background[0] == scene.background[1]
        if is_legal(scene, held_out=False) and not alike:
            for name, value in after.items():
                getattr(told, name)[i] = value
    return told


def unit_distances(x: Array, y: Array) -> list[Array]:
    """Signed distances of the unit shapes at (x, y), in the order of SHAPES; negative inside."""
    r = jnp.hypot(x, y)
    ax, ay = jnp.abs(x), jnp.abs(y)
    circle = r - 1.0
    square = jnp.maximum(ax, ay) - 0.86
    # Half-planes of an upright triangle, moved down so that it looks centred.
    triangle = jnp.maximum(y - 0.78, 0.866 * ax - 0.5 * (y + 1.02))
    # Star: fold the angle into one tenth, then one straight edge from tip to notch.
    a = jnp.arctan2(x, -y)
    sector = 2 * jnp.pi / 5
    a = jnp.abs(a - sector * jnp.round(a / sector))
    px, py = r * jnp.cos(a), r * jnp.sin(a)
    tip, notch = 1.08, 0.58
    nx, ny = notch * jnp.cos(sector / 2), notch * jnp.sin(sector / 2)
    ex, ey = nx - tip, ny - 0.0
    length = jnp.hypot(ex, ey)
    star = ((px - tip) * ey - py * ex) / length
    arm = 0.34
    cross = jnp.minimum(jnp.maximum(ax - 1.0, ay - arm), jnp.maximum(ax - arm, ay - 1.0))
    ring = jnp.abs(r - 0.75) - 0.25
    # Heart: a square on its corner and two discs on its upper edges.
    s = 0.56
    hy = y - 0.12
    u, v = (x + hy) * 0.70710678, (hy - x) * 0.70710678
    body = jnp.maximum(jnp.abs(u), jnp.abs(v)) - s
    lobe = jnp.hypot(ax - s * 0.70710678, hy + s * 0.70710678) - s
    heart = jnp.minimum(body, lobe)
    diamond = (ax * 1.25 + ay - 1.06) / 1.6
    return [circle, square, triangle, star, cross, ring, heart, diamond]


@partial(jax.jit, static_argnames=("width", "height"))
def render(scenes: Scene, *, width: int, height: int) -> Float[Array, "n height width 3"]:
    """Pictures of scenes (leading axis n): values in [-1, 1], edges anti-aliased over one pixel."""
    side = min(width, height)
    y, x = jnp.mgrid[:height, :width]
    x, y = (x + 0.5) / side, (y + 0.5) / side

    def one(scene: Scene) -> Array:
        back = jnp.asarray(_BACKGROUND_PALETTE)[scene.background]
        second = jnp.where(scene.split == 1, y > 0.5 * height / side, x > 0.5 * width / side)
        second = second & (scene.split > 0)
        picture = jnp.where(second[..., None], back[1], back[0])
        for i in range(3):
            radius = jnp.maximum(scene.radius[i], 1e-6)
            dx, dy = (x - scene.centre[i, 0]) / radius, (y - scene.centre[i, 1]) / radius
            distances = jnp.stack(unit_distances(dx, dy))
            distance = distances[scene.shape[i]] * radius * side
            alpha = jnp.where(i < scene.count, jnp.clip(0.5 - distance, 0.0, 1.0), 0.0)[..., None]
            colour = jnp.asarray(_PALETTE)[scene.colour[i]][None, None]
            picture = picture * (1 - alpha) + colour * alpha
        return picture

    return jax.vmap(one)(scenes)
