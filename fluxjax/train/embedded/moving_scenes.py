"""Drawn scenes that move: one coloured shape that goes, grows, shrinks or turns; two that pass.

`sample_moving_scenes` draws the attributes, `render_clips` the frames (jitted). Lengths are
measured in units of the frame's side, y points down. Pairs of colour and shape are held out as in
`scenes`: training never shows them, and `held_out=True` shows nothing else.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fluxjax.train.embedded.colours import BACKGROUNDS, COLOURS
from fluxjax.train.embedded.scenes import HELD_OUT_OBJECTS, SHAPES, unit_distances

MOTIONS = ("left", "right", "up", "down", "growing", "shrinking", "turning", "passing")
"""What a scene does; of two that pass, the first goes to the right and the second to the left."""
MOVING_SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
MOVING_COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
MOVING_SIZES = {"small": 0.15, "large": 0.21}
SMALLEST, LARGEST = 0.13, 0.25  # radii before and after growing
TRAVEL = (0.36, 0.46)
QUARTER = np.pi / 2  # how far a scene turns, clockwise
ROWS = (0.26, 0.74)  # of two that pass: they never touch
_EDGE = 0.02  # what stays free at the frame's edges
_WIDEST = 1.08  # the widest shape reaches this many radii from its centre
_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_PALETTE = np.array([COLOURS[name] for name in MOVING_COLOURS], np.float32) / 127.5 - 1
_BACKGROUND_PALETTE = np.array(list(BACKGROUNDS.values()), np.float32) / 127.5 - 1
_HELD_OUT = frozenset(HELD_OUT_OBJECTS)
# Index into `scenes.SHAPES` of each of MOVING_SHAPES.
_OF_ALL = np.array([SHAPES.index(name) for name in MOVING_SHAPES])


class MovingScene(NamedTuple):
    """Attributes of n scenes; of one object alone the second has radius 0.

    `motion` indexes MOTIONS, `shape` MOVING_SHAPES, `colour` MOVING_COLOURS, `size` MOVING_SIZES,
    `background` BACKGROUNDS. Of `centre` and `radius` the last but one and the last axis are the
    first and the last frame; `turn` is the last frame's angle, and the first one's is 0.
    """

    motion: np.ndarray  # int (n,)
    shape: np.ndarray  # int (n, 2)
    colour: np.ndarray  # int (n, 2)
    size: np.ndarray  # int (n,)
    background: np.ndarray  # int (n,)
    centre: np.ndarray  # float (n, 2 objects, 2 ends, 2), x and y
    radius: np.ndarray  # float (n, 2 objects, 2 ends)
    turn: np.ndarray  # float (n,)

    @property
    def count(self) -> np.ndarray:
        """Objects in each scene."""
        return 1 + (self.motion == MOTIONS.index("passing"))


def sample_moving_scenes(seed: int | tuple[int, ...], n: int, *, held_out: bool = False):
    """`n` scenes, a pure function of `seed` and `n`."""
    rng = np.random.default_rng(seed)
    scenes = [_sample(rng, held_out) for _ in range(n)]
    return MovingScene(*(np.stack(values) for values in zip(*scenes, strict=True)))


def _sample(rng: np.random.Generator, held_out: bool) -> tuple:
    motion = int(rng.integers(len(MOTIONS)))
    name = MOTIONS[motion]
    objects = _objects(rng, name, held_out)
    size = int(rng.integers(len(MOVING_SIZES)))
    centre, radius = np.full((2, 2, 2), 0.5), np.zeros((2, 2))
    if name == "passing":
        radius[:] = MOVING_SIZES["small"]
        rows = rng.permutation(ROWS)
        for i, towards in enumerate((1, -1)):
            centre[i] = _path(rng, (towards, 0), radius[i, 0], row=rows[i])
    elif name in _DIRECTIONS:
        radius[0] = list(MOVING_SIZES.values())[size]
        centre[0] = _path(rng, _DIRECTIONS[name], radius[0, 0])
    else:
        ends = {"growing": (SMALLEST, LARGEST), "shrinking": (LARGEST, SMALLEST)}
        radius[0] = ends.get(name, list(MOVING_SIZES.values())[size])
        reach = radius[0].max() * _WIDEST + _EDGE
        centre[0] = rng.uniform(reach, 1 - reach, 2)
    background = int(rng.integers(len(BACKGROUNDS)))
    turn = QUARTER if name == "turning" else 0.0
    shape, colour = (np.array(field) for field in zip(*objects, strict=True))
    fields = motion, shape, colour, size, background, centre, radius, turn
    return tuple(map(np.asarray, fields))


def _objects(rng: np.random.Generator, motion: str, held_out: bool) -> list[tuple[int, int]]:
    """(shape, colour) of two objects, of which the second is used where two pass.

    A circle that turns could not be told from one that does not.
    """
    while True:
        shapes = rng.integers(len(MOVING_SHAPES), size=2)
        colours = rng.permutation(len(MOVING_COLOURS))[:2]
        used = 2 if motion == "passing" else 1
        names = [
            (MOVING_COLOURS[c], MOVING_SHAPES[s]) for s, c in zip(shapes, colours, strict=True)
        ]
        out = any(pair in _HELD_OUT for pair in names[:used])
        turned = motion != "turning" or names[0][1] != "circle"
        if out == held_out and turned:
            return [(int(s), int(c)) for s, c in zip(shapes, colours, strict=True)]


def _path(
    rng: np.random.Generator,
    direction: tuple[int, int],
    radius: float,
    *,
    row: float | None = None,
) -> np.ndarray:
    """The centre in the first and the last frame, both inside of the frame."""
    reach = radius * _WIDEST + _EDGE
    travel = min(rng.uniform(*TRAVEL), 1 - 2 * reach)
    along = rng.uniform(reach, 1 - reach - travel) + np.array([0.0, travel])
    across = rng.uniform(reach, 1 - reach) if row is None else row
    axis = 0 if direction[0] else 1
    if direction[axis] < 0:
        along = along[::-1]
    path = np.full((2, 2), across)
    path[:, axis] = along
    return path


@partial(jax.jit, static_argnames=("frames", "side"))
def render_clips(
    scenes: MovingScene, *, frames: int, side: int
) -> Float[Array, "n frames side side 3"]:
    """Clips of scenes: values in [-1, 1], edges anti-aliased over one pixel."""
    y, x = (jnp.mgrid[:side, :side] + 0.5) / side
    share = jnp.linspace(0.0, 1.0, frames)

    def frame(scene: MovingScene, share: Array) -> Array:
        back = jnp.asarray(_BACKGROUND_PALETTE)[scene.background]
        picture = jnp.broadcast_to(back[None, None], (side, side, 3))
        for i in range(2):
            centre = scene.centre[i, 0] + share * (scene.centre[i, 1] - scene.centre[i, 0])
            radius = scene.radius[i, 0] + share * (scene.radius[i, 1] - scene.radius[i, 0])
            seen = radius > 0
            radius = jnp.where(seen, radius, 1.0)
            dx, dy = (x - centre[0]) / radius, (y - centre[1]) / radius
            # Pixels are turned back to where the upright shape has them.
            cos, sin = jnp.cos(share * scene.turn), jnp.sin(share * scene.turn)
            distances = jnp.stack(unit_distances(cos * dx + sin * dy, cos * dy - sin * dx))
            distance = distances[jnp.asarray(_OF_ALL)[scene.shape[i]]] * radius * side
            alpha = jnp.where(seen, jnp.clip(0.5 - distance, 0.0, 1.0), 0.0)[..., None]
            colour = jnp.asarray(_PALETTE)[scene.colour[i]][None, None]
            picture = picture * (1 - alpha) + colour * alpha
        return picture

    return jax.vmap(lambda scene: jax.vmap(partial(frame, scene))(share))(
        jax.tree.map(jnp.asarray, scenes)
    )
