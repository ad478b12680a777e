"""Clips as training data: counted, and cut to the lengths and the speed that are learnt.

Source: hpcaitech/Open-Sora `opensora/datasets` (at most so many frames a second, by leaving out all
but one frame in so many; a random start).
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fluxjax.clip_reader import opened_video
from fluxjax.picture_files import BadPicture
from fluxjax.train.data.buckets import fit
from fluxjax.train.data.settings import DataSettings


class Length(NamedTuple):
    """What decoding a whole clip finds: (width, height), how many frames, how many a second."""

    size: tuple[int, int]
    frames: int
    fps: float


class Piece(NamedTuple):
    """What of a clip is learnt: `count` frames from `start` on, one in `stride`."""

    start: int
    count: int
    stride: int

    def part(self, first: int, count: int) -> Piece:
        """`count` of its frames, from its `first` on."""
        return Piece(self.start + first * self.stride, count, self.stride)


def measure_clip(content: bytes, max_megapixels: float) -> Length:
    """Decodes all of it, frame after frame. Raises BadPicture for a clip that is damaged."""
    size, count = (0, 0), 0
    with opened_video(content, max_megapixels) as video:
        for frame in video.frames:
            if count and frame.shape[1::-1] != size:
                raise BadPicture("its frames have several sizes")
            size, count = frame.shape[1::-1], count + 1
    if not count:
        raise BadPicture("it has no frames")
    return Length(size, count, video.fps)


def speed(fps: float, most: int) -> tuple[int, int]:
    """(one in how many frames is taken, how many a second these are)."""
    stride = max(1, math.ceil(fps / most - 1e-3))
    return stride, max(1, round(fps / stride))


def pieces(digest: str, length: Length, settings: DataSettings) -> Iterator[Piece]:
    """Those of a clip, of the greatest length that it has; their starts are drawn from `digest`.

    Raises BadPicture for a clip that is shorter than every length.
    """
    stride, fps = speed(length.fps, settings.fps)
    there = -(-length.frames // stride)
    lengths = [frames for frames in settings.frames if frames > 1]
    if not lengths:
        raise BadPicture("it is a clip, and frames has no more than 1")
    count = max((frames for frames in lengths if frames <= there), default=0)
    if not count:
        raise BadPicture(
            f"it has {there} frame{'s' * (there != 1)} at {fps} a second, and the shortest that is "
            f"learnt has {min(lengths)}"
        )
    latest = length.frames - 1 - (count - 1) * stride
    for number in range(settings.pieces):
        seed = hashlib.sha256(f"{digest} {number}".encode()).digest()
        start = int(np.random.default_rng([*seed]).integers(latest + 1))
        yield Piece(start, count, stride)


def read_piece(
    content: bytes, piece: Piece, width: int, height: int, max_megapixels: float
) -> Float[np.ndarray, "frames height width 3"]:
    """Each frame scaled and cut as pictures are; in [-1, 1]. Raises BadPicture."""
    from PIL import Image

    found = np.empty((piece.count, height, width, 3), np.float32)
    stop = piece.start + (piece.count - 1) * piece.stride + 1
    count = 0
    with opened_video(content, max_megapixels) as video:
        taken = itertools.islice(video.frames, piece.start, stop, piece.stride)
        for count, frame in enumerate(taken, start=1):
            found[count - 1] = fit(Image.fromarray(np.ascontiguousarray(frame)), width, height)
    if count < piece.count:
        raise BadPicture(f"it ends after {count} of {piece.count} frames")
    return found
