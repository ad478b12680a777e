"""Drawn scenes, and edits of them, as sources of pictures with captions."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator

import jax
import numpy as np

from fluxjax.config import ConfigError
from fluxjax.train.data.buckets import bucket
from fluxjax.train.data.item import Item, bad_item
from fluxjax.train.data.random_masks import RandomMasks, draw_mask
from fluxjax.train.data.settings import OBJECTS, DataSettings
from fluxjax.train.embedded.edits import Edit, draw_edits
from fluxjax.train.embedded.holes import hole
from fluxjax.train.embedded.phrasing import captions, vary
from fluxjax.train.embedded.scenes import Scene, render, sample_scenes

BEFORE = "before"
_CHUNK = 64
_SEED = 11


def scene_items(settings: DataSettings) -> list[Item]:
    """`settings.scenes` scenes in chunks of one size, the sizes in turn; scene i never changes."""
    items = []
    for chunk, scenes, size in _chunks(settings):
        rng = np.random.default_rng((_SEED, chunk))
        for row, caption in enumerate(captions(scenes, _SEED * 1_000_003 + chunk)):
            name = "scene {}, {} x {}".format(chunk * _CHUNK + row, *size)
            scene = Scene(*(field[row] for field in scenes))
            item = _item(scene, size, name, vary(caption, rng).text)
            if settings.fill_masks == OBJECTS:
                holes = functools.partial(_holes, settings.random_masks, scene, item)
                item = item._replace(beside=holes)
            items.append(item)
    return items[: settings.scenes]


def edit_items(settings: DataSettings) -> list[Item]:
    """As many edits of scenes: what is wanted, with what is asked for; beside it is `before`."""
    items = []
    for chunk, scenes, size in _chunks(settings):
        rng = np.random.default_rng((_SEED, chunk))
        edits = draw_edits(scenes, rng, width=size[0], height=size[1], held_out=False)
        for row, edit in enumerate(edits):
            if edit is not None:
                name = "edit {}, {} x {}".format(chunk * _CHUNK + row, *size)
                item = _item(edit.after, size, name, edit.instruction)
                items.append(item._replace(beside=functools.partial(_before, edit, size, name)))
    return items[: settings.scenes]


def _holes(rule: RandomMasks, scene: Scene, item: Item, companion: str) -> Item:
    if companion != OBJECTS:  # masks that say what is learnt, say
        return bad_item(item.name, f"a drawn scene has {OBJECTS!r} beside it, and no {companion!r}")
    assert item.size is not None, "drawn pictures have one"
    digest, (width, height) = rule.digest(f"{OBJECTS} {item.digest}", 0), item.size
    if int(digest[-1], 16) % 2:
        read = functools.partial(draw_mask, rule, digest, width, height)
    else:
        read = functools.partial(_hole, scene, digest, width, height)
    return Item(f"a mask of {item.name}", "drawn", "", "", read, digest, (width, height))


def _hole(scene: Scene, digest: str, width: int, height: int) -> np.ndarray:
    rng = np.random.default_rng(int(digest[16:32], 16))
    inside = hole(scene, int(rng.integers(int(scene.count))), rng, width=width, height=height)
    return np.repeat((255 * inside).astype(np.uint8)[:, :, None], 3, axis=2)


def _before(edit: Edit, size: tuple[int, int], name: str, companion: str) -> Item:
    if companion != BEFORE:
        return bad_item(name, f"a drawn edit has {BEFORE!r} beside it, and no {companion!r}")
    return _item(edit.before, size, f"{BEFORE} {name}", "")


def _chunks(settings: DataSettings) -> Iterator[tuple[int, Scene, tuple[int, int]]]:
    """(number, scenes as numpy, (width, height)) of every chunk."""
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
    for chunk in range(-(-settings.scenes // _CHUNK)):
        width, height = sizes[chunk % len(sizes)]
        key = jax.random.fold_in(jax.random.key(_SEED), chunk)
        scenes = sample_scenes(key, _CHUNK, width=width, height=height)
        yield chunk, Scene(*(np.asarray(field) for field in scenes)), (width, height)


def _item(scene: Scene, size: tuple[int, int], name: str, text: str) -> Item:
    # Not of the pixels: another kind of device may round one of them otherwise.
    digest = hashlib.sha256(f"{_SEED} {name}".encode()).hexdigest()
    return Item(name, "drawn", text, "", functools.partial(_draw, scene, *size), digest, size)


def _draw(scene: Scene, width: int, height: int) -> np.ndarray:
    one = Scene(*(np.asarray(field)[None] for field in scene))
    pixels = np.asarray(render(one, width=width, height=height))[0]
    return np.round((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)
