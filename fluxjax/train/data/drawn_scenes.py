"""Drawn scenes as a source of pictures with captions."""

from __future__ import annotations

import functools
import hashlib

import jax
import numpy as np

from fluxjax.config import ConfigError
from fluxjax.train.data.buckets import bucket
from fluxjax.train.data.item import Item
from fluxjax.train.data.settings import DataSettings
from fluxjax.train.embedded.phrasing import captions, vary
from fluxjax.train.embedded.scenes import Scene, render, sample_scenes

_CHUNK = 64
_SEED = 11


def scene_items(settings: DataSettings) -> list[Item]:
    """`settings.scenes` scenes in chunks of one size, the sizes in turn; scene i never changes."""
    sizes = settings.scene_sizes or ((settings.resolution, settings.resolution),)
    for width, height in sizes:
        fitted = bucket(
            width,
            height,
            resolution=settings.resolution,
            step=settings.bucket_step,
            max_aspect=settings.max_aspect,
        )
        if fitted != (width, height):
            raise ConfigError(
                f"scenes of {width} x {height} would be cut to {fitted[0]} x {fitted[1]} by "
                f"resolution={settings.resolution} and bucket_step={settings.bucket_step}"
            )
    items = []
    for chunk in range(-(-settings.scenes // _CHUNK)):
        width, height = sizes[chunk % len(sizes)]
        key = jax.random.fold_in(jax.random.key(_SEED), chunk)
        scenes = sample_scenes(key, _CHUNK, width=width, height=height)
        scenes = Scene(*(np.asarray(field) for field in scenes))
        rng = np.random.default_rng((_SEED, chunk))
        for row, caption in enumerate(captions(scenes, _SEED * 1_000_003 + chunk)):
            name = f"scene {chunk * _CHUNK + row}, {width} x {height}"
            scene = Scene(*(field[row : row + 1] for field in scenes))
            read = functools.partial(_draw, scene, width, height)
            # Not of the pixels: another kind of device may round one of them otherwise.
            digest = hashlib.sha256(f"{_SEED} {name}".encode()).hexdigest()
            text = vary(caption, rng).text
            items.append(Item(name, "drawn", text, "", read, digest, (width, height)))
    return items[: settings.scenes]


def _draw(scene: Scene, width: int, height: int) -> np.ndarray:
    pixels = np.asarray(render(scene, width=width, height=height))[0]
    return np.round((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)
