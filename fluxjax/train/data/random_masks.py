"""Masks drawn at random: what a model that fills is trained to paint anew."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import UInt8

from fluxjax.config import ConfigError

Shape = Literal["rectangle", "ellipse", "stroke", "border"]
_DISCS = 200  # of a stroke, at most


@dataclass(frozen=True, kw_only=True)
class RandomMasks:
    """Each mask is of one shape; which one, and where, follows from the picture alone."""

    shapes: tuple[Shape, ...] = get_args(Shape)
    """stroke: of a brush; border: all but a rectangle, as for painting beyond the edges."""
    least: float = 0.05
    """Share of the picture that is painted anew."""
    most: float = 0.6
    each: int = 4
    """Masks of every picture; it is seen equally often with each."""

    def __post_init__(self) -> None:
        if not self.shapes:
            raise ConfigError("random_masks.shapes must name at least one shape")
        if not 0 < self.least <= self.most < 1:
            raise ConfigError(
                f"random_masks needs 0 < least <= most < 1, got {self.least} and {self.most}"
            )
        if not 1 <= self.each <= 1000:
            raise ConfigError(f"random_masks.each must be from 1 to 1000, got {self.each}")

    def digest(self, picture: str, number: int) -> str:
        """Stands for one mask of a picture, which its own digest `picture` stands for."""
        rule = f"{self.shapes} {self.least} {self.most}"
        return hashlib.sha256(f"{rule} {picture} {number}".encode()).hexdigest()


def draw_mask(
    rule: RandomMasks, digest: str, width: int, height: int
) -> UInt8[np.ndarray, "height width 3"]:
    """White is painted anew. `digest`: of `RandomMasks.digest`."""
    rng = np.random.default_rng(int(digest[:16], 16))
    shape = rule.shapes[int(rng.integers(len(rule.shapes)))]
    area = float(rng.uniform(rule.least, rule.most))
    inside = _DRAWN[shape](rng, area, width, height)
    return np.repeat(np.where(inside, 255, 0).astype(np.uint8)[:, :, None], 3, axis=2)


def _box(rng: np.random.Generator, area: float, width: int, height: int) -> tuple[int, ...]:
    """(left, top, right, bottom) of about this share of the picture, inside it."""
    ratio = np.exp(rng.uniform(-0.7, 0.7))
    wide = min(1.0, max(area, np.sqrt(area * ratio)))
    w, h = max(1, round(wide * width)), max(1, round(area / wide * height))
    left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
    return int(left), int(top), int(left) + w, int(top) + h


def _rectangle(rng: np.random.Generator, area: float, width: int, height: int) -> np.ndarray:
    left, top, right, bottom = _box(rng, area, width, height)
    inside = np.zeros((height, width), bool)
    inside[top:bottom, left:right] = True
    return inside


def _ellipse(rng: np.random.Generator, area: float, width: int, height: int) -> np.ndarray:
    left, top, right, bottom = _box(rng, min(1.0, area * 4 / np.pi), width, height)
    y, x = np.mgrid[:height, :width] + 0.5
    across = (2 * x - left - right) / (right - left)
    down = (2 * y - top - bottom) / (bottom - top)
    return across**2 + down**2 <= 1


def _border(rng: np.random.Generator, area: float, width: int, height: int) -> np.ndarray:
    return ~_rectangle(rng, 1 - area, width, height)


def _stroke(rng: np.random.Generator, area: float, width: int, height: int) -> np.ndarray:
    """Discs along a line with bends, until the share is reached."""
    y, x = np.mgrid[:height, :width] + 0.5
    side = min(width, height)
    radius = side * rng.uniform(0.06, 0.16)
    at, angle = rng.uniform((0, 0), (width, height)), rng.uniform(0, 2 * np.pi)
    inside = np.zeros((height, width), bool)
    for _ in range(_DISCS):
        inside |= (x - at[0]) ** 2 + (y - at[1]) ** 2 <= radius**2
        if inside.mean() >= area:
            break
        angle += rng.normal(0, 0.5)
        at = at + radius * np.array([np.cos(angle), np.sin(angle)])
        if (at < 0).any() or at[0] > width or at[1] > height:
            at = np.clip(at, 0, (width, height))
            angle = rng.uniform(0, 2 * np.pi)
    return inside


_DRAWN = {"rectangle": _rectangle, "ellipse": _ellipse, "stroke": _stroke, "border": _border}
