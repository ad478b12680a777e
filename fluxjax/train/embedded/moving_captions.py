"""Captions of drawn scenes that move: what people type when they want one.

Of two objects that pass each other the one that is named first goes to the right.
"""

from __future__ import annotations

import numpy as np

from fluxjax.train.embedded import phrases
from fluxjax.train.embedded.moving_scenes import (
    MOTIONS,
    MOVING_COLOURS,
    MOVING_SHAPES,
    MOVING_SIZES,
    MovingScene,
)
from fluxjax.train.embedded.phrasing import with_article
from fluxjax.train.embedded.scenes import BACKGROUNDS

# {a} is the one object, or the first of two; what stands twice is likelier.
SENTENCES = {
    "left": (
        "{a} moving to the left",
        "{a} moving left",
        "{a} moves to the left",
        "{a} moves left",
        "{a} going left",
    ),
    "right": (
        "{a} moving to the right",
        "{a} moving right",
        "{a} moves to the right",
        "{a} moves right",
        "{a} going right",
    ),
    "up": ("{a} moving up", "{a} moving up", "{a} moves up", "{a} going up", "{a} rising"),
    "down": (
        "{a} moving down",
        "{a} moving down",
        "{a} moves down",
        "{a} going down",
        "{a} falling",
    ),
    "growing": ("{a} growing", "{a} growing", "{a} grows", "{a} getting bigger"),
    "shrinking": ("{a} shrinking", "{a} shrinking", "{a} shrinks", "{a} getting smaller"),
    "turning": ("{a} turning", "{a} turning", "{a} turns", "{a} rotating"),
    "passing": (
        "{a} and {b} passing each other",
        "{a} and {b} pass each other",
        "{a} moving right and {b} moving left",
        "{a} moves to the right and {b} moves to the left",
    ),
}
SIZED = 0.4  # share of captions that say how large it is, where it keeps its size
NO_BACKGROUND = 0.1  # share that leaves the background open
BACKGROUND_PHRASES = (" on a {} background", " on a {} background", " on {}", ", {} background")


def moving_caption(scenes: MovingScene, i: int, rng: np.random.Generator) -> str:
    """A caption of the scene `i`."""
    motion = MOTIONS[int(scenes.motion[i])]
    sized = motion in ("left", "right", "up", "down", "turning") and rng.random() < SIZED
    size = list(MOVING_SIZES)[int(scenes.size[i])]

    def noun(k: int) -> str:
        colour = MOVING_COLOURS[int(scenes.colour[i, k])]
        shape = MOVING_SHAPES[int(scenes.shape[i, k])]
        colour = _any(rng, phrases.COLOUR_WORDS.get(colour, (colour,)))
        return with_article(f"{size} {colour} {shape}" if sized else f"{colour} {shape}")

    said = _any(rng, SENTENCES[motion]).format(a=noun(0), b=noun(1))
    if rng.random() < NO_BACKGROUND:
        return said
    name = list(BACKGROUNDS)[int(scenes.background[i])]
    word = _any(rng, phrases.BACKGROUND_WORDS.get(name, (name,)))
    return said + _any(rng, BACKGROUND_PHRASES).format(word)


def moving_captions(scenes: MovingScene, seed: int | tuple[int, ...]) -> list[str]:
    """A caption of each scene; a pure function of its arguments."""
    rng = np.random.default_rng(seed)
    return [moving_caption(scenes, i, rng) for i in range(len(scenes.motion))]


def _any(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def states_background(caption: str) -> bool:
    """Whether a caption says what the background is: no object has a background's colour."""
    named = {word for name in BACKGROUNDS for word in phrases.BACKGROUND_WORDS.get(name, (name,))}
    return any(word in caption for word in named)
