"""Drawn scenes: what is held out, where things stand, what a picture shows."""

from functools import cache

import jax
import numpy as np
import pytest

from fluxjax.train.embedded import scenes as world
from fluxjax.train.embedded.scenes import Scene, render, sample_scenes

SIDE = {"width": 96, "height": 96}
N = 256


@cache  # drawing compiles once per size and number
def numpy_scenes(width: int = 96, height: int = 96, held_out: bool = False) -> Scene:
    drawn = sample_scenes(jax.random.key(0), N, width=width, height=height, held_out=held_out)
    return Scene(*(np.asarray(field) for field in drawn))


def one(scenes: Scene, i: int) -> Scene:
    return Scene(*(field[i] for field in scenes))


def is_held_out(scene: Scene) -> bool:
    used = range(int(scene.count))
    shapes = [world.SHAPES[scene.shape[i]] for i in used]
    colours = [list(world.COLOURS)[scene.colour[i]] for i in used]
    objects = any(o in world.HELD_OUT_OBJECTS for o in zip(colours, shapes, strict=True))
    if world.KINDS[scene.kind] == "count":
        return objects
    pairs = {frozenset((a, b)) for i, a in enumerate(shapes) for b in shapes[i + 1 :]}
    return objects or any(frozenset(pair) in pairs for pair in world.HELD_OUT_PAIRS)


@pytest.mark.parametrize("held_out", [False, True])
def test_held_out_scenes_and_no_others_show_a_held_out_object_or_pair(held_out):
    scenes = numpy_scenes(held_out=held_out)
    assert {is_held_out(one(scenes, i)) for i in range(N)} == {held_out}


def test_every_attribute_occurs():
    scenes = numpy_scenes()
    for field, options in (
        ("kind", world.KINDS),
        ("shape", world.SHAPES),
        ("colour", world.COLOURS),
        ("size", world.SIZES),
        ("relation", world.RELATIONS),
        ("background", world.BACKGROUNDS),
        ("split", world.SPLITS),
    ):
        assert set(getattr(scenes, field).ravel()) == set(range(len(options))), field


def test_no_object_has_its_backgrounds_colour_and_others_have_every_colour():
    scenes = numpy_scenes()
    colours, backs = list(world.COLOURS), list(world.BACKGROUNDS)
    for i in range(N):
        shown = {backs[b] for b in scenes.background[i][: 2 if scenes.split[i] else 1]}
        seen = {colours[c] for c in scenes.colour[i][: scenes.count[i]]}
        assert not shown & seen
    assert set(scenes.colour[scenes.count > 0].ravel()) == set(range(len(colours)))


def test_pairs_stand_as_their_relation_says_and_rows_from_left_to_right():
    scenes = numpy_scenes()
    pair = scenes.kind == world.KINDS.index("pair")
    dx, dy = np.moveaxis(scenes.centre[pair, 0] - scenes.centre[pair, 1], -1, 0)
    along = np.choose(scenes.relation[pair], [-dx, dx, -dy, dy])
    across = np.where(scenes.relation[pair] < 2, np.abs(dy), np.abs(dx))
    assert (along > across).all()
    row = scenes.centre[scenes.kind == world.KINDS.index("row"), :, 0]
    assert (np.diff(row, axis=1) > 0).all()


@pytest.mark.parametrize(("width", "height"), [(96, 96), (112, 80), (64, 64), (160, 160)])
def test_objects_stay_inside_and_apart(width, height):
    scenes = numpy_scenes(width=width, height=height)
    limits = np.array([width, height]) / min(width, height)
    used = np.arange(3) < scenes.count[:, None]
    low = (scenes.centre - scenes.radius[..., None])[used]
    high = (scenes.centre + scenes.radius[..., None])[used]
    assert (low > 0).all() and (high < limits).all()
    grid = world.GRID if min(width, height) < world.COARSE_SIDE else world.COARSE_GRID
    pixels = scenes.centre[used] * min(width, height) / grid
    np.testing.assert_allclose(pixels, np.round(pixels), atol=1e-4)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        both = used[:, i] & used[:, j]
        gap = np.linalg.norm(scenes.centre[:, i] - scenes.centre[:, j], axis=-1)
        gap -= scenes.radius[:, i] + scenes.radius[:, j]
        assert (gap[both] * min(width, height) >= world.LEAST_GAP - 1e-4).all()


def test_a_picture_shows_colour_background_split_and_smooth_edges():
    scenes = Scene(*(field[:1] for field in numpy_scenes()))._replace(
        kind=np.array([0]),
        count=np.array([1]),
        shape=np.array([[0, 0, 0]]),
        colour=np.array([[3, 0, 0]]),
        centre=np.full((1, 3, 2), 0.5, np.float32),
        radius=np.full((1, 3), 0.25, np.float32),
        background=np.array([[0, 4]]),
        split=np.array([1]),
    )
    picture = (np.asarray(render(scenes, **SIDE))[0] + 1) * 127.5
    np.testing.assert_allclose(picture[48, 48], world.COLOURS["green"], atol=0.01)
    np.testing.assert_allclose(picture[5, 5], world.BACKGROUNDS["white"], atol=0.01)
    np.testing.assert_allclose(picture[90, 5], world.BACKGROUNDS["navy"], atol=0.01)
    top = picture[:48, :, 0]  # red goes from 250 outside to 36 inside
    area = ((250 - top) / (250 - 36)).sum() * 2
    assert area == pytest.approx(np.pi * 24**2, rel=0.01)
    assert ((top > 45) & (top < 240)).sum() > 30


def test_captions_may_tell_of_scenes_that_are_not_shown_but_never_of_what_is_held_out():
    scenes = numpy_scenes()
    told = world.tell_otherwise(scenes, np.random.default_rng(0), 1.0)
    changed = [
        name for name in Scene._fields if (getattr(told, name) != getattr(scenes, name)).any()
    ]
    assert changed == ["shape", "colour", "relation", "background"]
    for i in range(N):
        scene = one(told, i)
        assert world.is_legal(scene, held_out=False) and not is_held_out(scene)
        if world.KINDS[scene.kind] == "count":
            assert len(set(scene.shape)) == len(set(scene.colour)) == 1
        if scene.split:
            assert scene.background[0] != scene.background[1]
    assert 0.35 < np.mean(told.shape != scenes.shape) < 0.6
    some = world.tell_otherwise(scenes, np.random.default_rng(0), 0.3)
    share = np.mean((some.shape != scenes.shape).any(-1) | (some.colour != scenes.colour).any(-1))
    assert 0.15 < share < 0.35
    for before, after in zip(
        scenes, world.tell_otherwise(scenes, np.random.default_rng(0), 0.0), strict=True
    ):
        np.testing.assert_array_equal(before, after)


def test_scenes_of_colours_that_are_left_out_are_told_as_they_are():
    scenes, without = numpy_scenes(), ("white", "black", "gray")
    told = world.tell_otherwise(scenes, np.random.default_rng(0), 1.0, without)
    shown = world.shows(scenes, without)
    assert 0.2 < shown.mean() < 0.6
    for before, after in zip(scenes, told, strict=True):
        np.testing.assert_array_equal(before[shown], after[shown])
    assert (told.colour != scenes.colour).any() and not world.shows(told, without)[~shown].any()
