"""Sizes of videos by the names of an area and of a ratio, as Open-Sora has them.

Source: hpcaitech/Open-Sora `opensora/datasets/aspect.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fluxjax.config.base import require

AREAS: Mapping[str, int] = {
    "256px": 256**2,
    "360p": 640 * 360,
    "512px": 512**2,
    "720p": 1280 * 720,
    "768px": 768**2,
    "1024px": 1024**2,
}
RATIOS = ("2.39:1", "2:1", "16:9", "1.85:1", "9:16", "5:8", "3:2", "4:3", "1:1")
"""Width to height; each has its reverse, which of two that are here the later one gives."""


def video_sizes(area: str, unit: int = 16, *, training: bool = False) -> dict[str, tuple[int, int]]:
    """ratio -> (height, width) in pixels, multiples of `unit`, of about the pixels of `area`.

    In `training` the sizes are the nearest in area, and none of `RATIOS` has an earlier one's.
    Raises ConfigError for an area that there is not.
    """
    require(area in AREAS, f"{area!r} is no area of a video: there are {', '.join(AREAS)}")
    pixels = AREAS[area]
    sizes: dict[str, tuple[int, int]] = {}
    for name in RATIOS:
        wide, high = map(float, name.split(":"))
        width = math.floor(math.sqrt(pixels * wide / high) / unit) * unit
        height = math.floor(pixels / width / unit) * unit
        if training:
            height, width = _nearest(height, width, unit, pixels)
        if not (training and (height, width) in sizes.values()):
            sizes[name] = height, width
    return sizes | {_reverse(name): (width, height) for name, (height, width) in sizes.items()}


def video_size(area: str, ratio: str, unit: int = 16, *, training: bool = False) -> tuple[int, int]:
    """(height, width). Raises ConfigError for an area or a ratio that there is not."""
    sizes = video_sizes(area, unit, training=training)
    require(ratio in sizes, f"{ratio!r} is no ratio of {area}: there are {', '.join(sizes)}")
    return sizes[ratio]


def _reverse(name: str) -> str:
    return ":".join(reversed(name.split(":")))


def _nearest(height: int, width: int, unit: int, pixels: int) -> tuple[int, int]:
    near = [(height + i * unit, width + j * unit) for i in (0, 1) for j in (0, 1)]
    return min(near, key=lambda size: abs(size[0] * size[1] - pixels))
