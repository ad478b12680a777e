"""Reads a clip of a drawn scene back from its frames, and scores it against what was asked for.

Each frame is read as a picture (`reader.read`), with shapes in any turn; objects of neighbouring
frames that are nearest to each other are one. No network is involved, so it measures networks.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fluxjax.train.embedded.moving_scenes import (
    MOTIONS,
    MOVING_COLOURS,
    MOVING_SHAPES,
    MovingScene,
)
from fluxjax.train.embedded.reader import Reading, ReadObject, Tally, Templates, read, templates
from fluxjax.train.embedded.scenes import BACKGROUNDS, COLOURS, SHAPES

CLIP_ATTRIBUTES = ("colour", "shape", "direction", "itself", "background", "all")
TRAVELLED = 0.15  # of the side: less is no way; the shortest drawn is 0.36
GROWN = 0.3  # of the logarithm of the radius; drawn is 0.65
TURNED = np.pi / 5  # drawn is a quarter of a circle
# After how much of a turn a shape looks as before.
_SYMMETRY = {"square": np.pi / 2, "cross": np.pi / 2, "triangle": 2 * np.pi / 3}
_SYMMETRY |= {"star": 2 * np.pi / 5, "circle": 0.0, "heart": 2 * np.pi}


class Track(NamedTuple):
    """One object through the frames in which it was seen, the earliest first."""

    seen: list[ReadObject]

    @property
    def colour(self) -> str:
        """The one it has in most frames."""
        return list(COLOURS)[_most([o.colour for o in self.seen])]

    @property
    def shape(self) -> str:
        """As `colour`; "" where it resembles none."""
        index = _most([o.shape for o in self.seen])
        return SHAPES[index] if index >= 0 else ""

    @property
    def travelled(self) -> Float[np.ndarray, "2"]:
        """From the first frame to the last, along a straight line through all."""
        return _change(np.array([o.centre for o in self.seen]))

    @property
    def grown(self) -> float:
        """The change of the logarithm of the radius, likewise."""
        return float(_change(np.log([[o.radius] for o in self.seen]))[0])

    @property
    def turned(self) -> float:
        """Clockwise, in radians; between two frames less than half of what looks the same."""
        period = _SYMMETRY.get(self.shape, 0.0)
        if not period:
            return 0.0
        angles = np.array([o.angle for o in self.seen if o.shape == SHAPES.index(self.shape)])
        return float(_change(np.unwrap(angles, period=period)[:, None])[0])

    @property
    def steady(self) -> bool:
        """Whether it has its colour and shape in every frame."""
        own = SHAPES.index(self.shape) if self.shape else -1
        return own >= 0 and all(
            o.shape == own and list(COLOURS)[o.colour] == self.colour for o in self.seen
        )


class ClipReading(NamedTuple):
    """`motion` is one of MOTIONS or "none"; the first of two tracks that pass goes to the right.

    `itself`: in every frame there are the same objects, each with the same colour and shape.
    """

    tracks: tuple[Track, ...]
    motion: str
    background: str
    itself: bool


def read_clip(clip: Float[np.ndarray, "frames side side 3"]) -> ClipReading:
    """Read a clip in [-1, 1] back into objects, what they do, and the background."""
    frames = [read(frame, _any_turn()) for frame in clip]
    count = _most([len(frame.objects) for frame in frames])
    tracks = _tracks(frames, count)
    motion, tracks = _motion(tracks)
    whole = count > 0 and all(len(frame.objects) == count for frame in frames)
    backgrounds = [list(BACKGROUNDS)[i] for frame in frames for i in frame.background]
    return ClipReading(
        tuple(tracks),
        motion,
        Counter(backgrounds).most_common(1)[0][0],
        whole and all(track.steady for track in tracks),
    )


@cache
def _any_turn() -> Templates:
    return templates(tuple(np.arange(36) * (np.pi / 18)), MOVING_SHAPES)


def _most(values: list[int]) -> int:
    """The most frequent, of several the first."""
    return Counter(values).most_common(1)[0][0]


def _change(values: Float[np.ndarray, "n axes"]) -> Float[np.ndarray, "axes"]:
    """Of a straight line through the values, from the first to the last."""
    if len(values) < 2:
        return np.zeros(values.shape[1])
    return np.polyfit(np.linspace(0.0, 1.0, len(values)), values, 1)[0]


def _tracks(frames: list[Reading], count: int) -> list[Track]:
    """The `count` largest objects, each followed to the nearest one of the next frame."""
    tracks: list[Track] = []
    for frame in frames:
        objects = list(frame.objects[:count])
        if not tracks:
            tracks = [Track([o]) for o in objects]
            continue
        for track in tracks:
            if not objects:
                break
            nearest = min(objects, key=lambda o: _apart(o, track.seen[-1]))
            objects.remove(nearest)
            track.seen.append(nearest)
    return tracks


def _apart(a: ReadObject, b: ReadObject) -> float:
    return float(np.hypot(a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]))


def _motion(tracks: list[Track]) -> tuple[str, list[Track]]:
    """What the tracks do, and they in the order of `ClipReading`."""
    if len(tracks) == 2:
        left, right = sorted(tracks, key=lambda track: track.travelled[0])
        passed = left.travelled[0] < -TRAVELLED and right.travelled[0] > TRAVELLED
        return ("passing" if passed else "none"), [right, left]
    if len(tracks) != 1:
        return "none", tracks
    return _alone(tracks[0]), tracks


def _alone(track: Track) -> str:
    """What one object does."""
    x, y = map(float, track.travelled)
    if max(abs(x), abs(y)) > TRAVELLED:
        if 0.5 < abs(x) / max(abs(y), 1e-6) < 2.0:
            return "none"
        return ("left", "right")[x > 0] if abs(x) > abs(y) else ("up", "down")[y > 0]
    if abs(track.grown) > GROWN:
        return ("shrinking", "growing")[track.grown > 0]
    return "turning" if track.turned > TURNED else "none"


def score_clip(
    scenes: MovingScene, i: int, reading: ClipReading, *, states_background: bool = True
) -> dict[str, Tally]:
    """What a clip got right of scene `i`, by attribute.

    Colour and shape are counted by object, of two by their places (the first goes to the right);
    the rest once per clip. What the caption leaves open is not asked.
    """
    count = int(scenes.count[i])
    colour = shape = 0
    for k, track in enumerate(reading.tracks[:count]):
        colour += track.colour == MOVING_COLOURS[int(scenes.colour[i, k])]
        shape += track.shape == MOVING_SHAPES[int(scenes.shape[i, k])]
    back = reading.background == list(BACKGROUNDS)[int(scenes.background[i])]
    tallies = {
        "colour": Tally(colour, count),
        "shape": Tally(shape, count),
        "direction": Tally(int(reading.motion == MOTIONS[int(scenes.motion[i])]), 1),
        "itself": Tally(int(reading.itself), 1),
        "background": Tally(int(back and states_background), int(states_background)),
    }
    everything = all(right == asked for right, asked in tallies.values())
    return {**tallies, "all": Tally(int(everything), 1)}
