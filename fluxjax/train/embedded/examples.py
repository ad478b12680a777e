"""Drawn scenes, encoded by the frozen networks: a pool for each size of picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fluxjax.train.embedded.phrasing import captions, vary
from fluxjax.train.embedded.scenes import render, sample_scenes, shows, tell_otherwise
from fluxjax.train.flow_matching import Rows

Sizes = tuple[tuple[int, int], ...]
CHUNK = 64


class Teaching(NamedTuple):
    """Another network that says what is to be learnt of an example."""

    teach: Callable[[Any, Any, Any, Any], tuple[Any, Any]]
    """(key, latents, what captions say, whether the teacher knows what is shown) -> what is learnt
    from and what is heard."""
    told_otherwise: float
    """The share of captions that say what the picture does not show (`tell_otherwise`)."""
    unlearnt: tuple[str, ...]
    """Colours of objects that the teacher does not know."""


class Conditioner(NamedTuple):
    """Frozen networks around the one that learns, as functions with their parameters bound."""

    encode_image: Callable[[Any], Any]
    """(n, height, width, 3) -> the latents that are learnt from, normalised and packed."""
    encode_text: Callable[[list[str]], Any]
    """What n captions say: a Conditioning, or a tuple of them for several listeners."""
    teaching: Teaching | None = None
    """What becomes of examples before they are learnt from."""


class Pool:
    """Examples of one bucket: a ring that a few fresh ones enter at each step.

    Example k depends on (seed, bucket, k // chunk) alone, so a resumed run sees the same pool.
    """

    def __init__(
        self, bucket: int, stage: Any, conditioner: Conditioner, step: int, taken: int
    ) -> None:
        """`stage` has `buckets`, of each of which it keeps a `pool` that `fresh` ones enter at each
        step, and a `seed`; a batch has `taken` rows."""
        self.width, self.height = stage.buckets[bucket]
        self.stage, self.conditioner, self.bucket = stage, conditioner, bucket
        self.taken = taken
        chunks = stage.pool // CHUNK
        self.next = self._due(step)
        first = [self._draw(i) for i in range(self.next - chunks, self.next)]
        self.rows = jax.tree.map(lambda *parts: np.concatenate(parts), *first)

    def _due(self, step: int) -> int:
        """How many chunks have been drawn once `step` begins."""
        return self.stage.pool // CHUNK + step * self.stage.fresh // CHUNK

    def _draw(self, index: int) -> tuple[Any, Any]:
        """What is learnt from, latents or what a teacher makes of them, and what the text encoders
        say, of one chunk."""
        seed = self.stage.seed * 1_000_003 + self.bucket
        key = jax.random.fold_in(jax.random.key(seed), index)
        scenes = sample_scenes(key, CHUNK, width=self.width, height=self.height)
        rng = np.random.default_rng((seed, index))
        teaching, told = self.conditioner.teaching, scenes
        if teaching is not None:
            told = tell_otherwise(scenes, rng, teaching.told_otherwise, teaching.unlearnt)
        texts = [vary(c, rng).text for c in captions(told, seed * 1_000_003 + index)]
        latents = self.conditioner.encode_image(
            render(scenes, width=self.width, height=self.height)
        )
        each = latents, self.conditioner.encode_text(texts)
        if teaching is not None:
            known = ~shows(scenes, teaching.unlearnt)
            each = teaching.teach(jax.random.fold_in(key, 1), *each, known)
        return jax.tree.map(_stored, each)

    def batch(self, step: int) -> Rows:
        while self.next < self._due(step):
            row = self.next * CHUNK % self.stage.pool
            fresh = self._draw(self.next)
            for old, new in zip(*map(jax.tree.leaves, (self.rows, fresh)), strict=True):
                old[row : row + CHUNK] = new
            self.next += 1
        rng = np.random.default_rng((self.stage.seed, step))
        rows = rng.integers(self.stage.pool, size=self.taken)
        latents, heard = jax.tree.map(lambda value: _taken(value[rows]), self.rows)
        return Rows(latents, heard, np.arange(self.taken, dtype=np.int32))


def _stored(value: Any) -> np.ndarray:
    """Numbers in half the bytes; a mask as it is."""
    kept = np.asarray(value)
    return kept if kept.dtype.kind == "i" else kept.astype(np.float16)


def _taken(value: np.ndarray) -> np.ndarray:
    return value if value.dtype.kind == "i" else value.astype(np.float32)
