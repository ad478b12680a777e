"""Drawn scenes: what is held out, where things stand, and what the captions say."""

import re
from functools import cache

import jax
import numpy as np
import pytest

from fluxjax.train.embedded import scenes as world
from fluxjax.train.embedded.scenes import Caption, Scene, caption, captions, render, sample_scenes

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


def test_pairs_stand_as_their_relation_says_and_rows_from_left_to_right():
    scenes = numpy_scenes()
    pair = scenes.kind == world.KINDS.index("pair")
    dx, dy = np.moveaxis(scenes.centre[pair, 0] - scenes.centre[pair, 1], -1, 0)
    along = np.choose(scenes.relation[pair], [-dx, dx, -dy, dy])
    across = np.where(scenes.relation[pair] < 2, np.abs(dy), np.abs(dx))
    assert (along > across).all()
    row = scenes.centre[scenes.kind == world.KINDS.index("row"), :, 0]
    assert (np.diff(row, axis=1) > 0).all()


@pytest.mark.parametrize(("width", "height"), [(96, 96), (112, 80)])
def test_objects_stay_inside_and_apart(width, height):
    scenes = numpy_scenes(width=width, height=height)
    limits = np.array([width, height]) / min(width, height)
    used = np.arange(3) < scenes.count[:, None]
    low = (scenes.centre - scenes.radius[..., None])[used]
    high = (scenes.centre + scenes.radius[..., None])[used]
    assert (low > 0).all() and (high < limits).all()
    pixels = scenes.centre[used] * min(width, height) / world.GRID
    np.testing.assert_allclose(pixels, np.round(pixels), atol=1e-4)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        both = used[:, i] & used[:, j]
        gap = np.linalg.norm(scenes.centre[:, i] - scenes.centre[:, j], axis=-1)
        gap -= scenes.radius[:, i] + scenes.radius[:, j]
        assert (gap[both] > -1e-6).all()


def test_a_picture_shows_colour_background_split_and_smooth_edges():
    scenes = Scene(*(field[:1] for field in numpy_scenes()))._replace(
        kind=np.array([0]), count=np.array([1]), shape=np.array([[0, 0, 0]]),
        colour=np.array([[3, 0, 0]]), centre=np.full((1, 3, 2), 0.5, np.float32),
        radius=np.full((1, 3), 0.25, np.float32), background=np.array([[0, 4]]),
        split=np.array([1]),
    )  # fmt: skip
    picture = (np.asarray(render(scenes, **SIDE))[0] + 1) * 127.5
    np.testing.assert_allclose(picture[48, 48], world.COLOURS["green"], atol=0.01)
    np.testing.assert_allclose(picture[5, 5], world.BACKGROUNDS["white"], atol=0.01)
    np.testing.assert_allclose(picture[90, 5], world.BACKGROUNDS["navy"], atol=0.01)
    top = picture[:48, :, 0]  # red goes from 250 outside to 36 inside
    area = ((250 - top) / (250 - 36)).sum() * 2
    assert area == pytest.approx(np.pi * 24**2, rel=0.01)
    assert ((top > 45) & (top < 240)).sum() > 30


def test_the_same_seed_writes_the_same_captions_and_another_others():
    scenes = numpy_scenes()
    assert captions(scenes, 3) == captions(scenes, 3)
    assert captions(scenes, 3) != captions(scenes, 4)


def test_a_caption_names_what_the_scene_holds_and_marks_what_it_states():
    scenes = numpy_scenes()
    for i, (text, states_size, states_background) in enumerate(captions(scenes, 1)):
        scene = one(scenes, i)
        count = int(scene.count)
        counted = world.KINDS[scene.kind] == "count"
        sizes = 0
        for k in range(1 if counted else count):
            colour = list(world.COLOURS)[scene.colour[k]]
            shape = world.SHAPES[scene.shape[k]]
            assert any(w in text for w in world.COLOUR_WORDS.get(colour, (colour,))), text
            assert any(w in text for w in world.SHAPE_WORDS.get(shape, (shape,))), text
            words = world.SIZE_WORDS[scene.size[k]]
            assert not states_size[k] or re.search(rf"\b({'|'.join(words)})\b", text), text
            sizes += states_size[k]
        every_size = [w for words in world.SIZE_WORDS for w in words]
        assert len(re.findall(rf"\b({'|'.join(every_size)})\b", text)) == sizes, text
        names = [list(world.BACKGROUNDS)[b] for b in scene.background]
        stated = [name for name in world.BACKGROUNDS if re.search(rf"\b{name}\b", text)]
        shown = names if scene.split else names[:1]
        assert set(stated) == (set(shown) if states_background else set()), text


def test_captions_are_grammatical():
    scenes = numpy_scenes()
    for text, *_ in captions(scenes, 2):
        assert not re.search(r"\ba [aeiou]", text), text
        assert not re.search(r"\ban [^aeiou]", text), text
        assert "there is two" not in text and "there is 3" not in text, text
        assert "  " not in text and text == text.strip() and "{" not in text, text
        assert len(re.findall(r"crosss|shs\b|crosses", text)) <= 1, text
        many = re.match(r".*\b(two|three|2|3|pair of|group of three) ", text)
        if many:
            assert re.search(r"(s|crosses)( |$)", text[many.end() :]), text


@pytest.mark.parametrize(("relation", "expected"), [(0, "left"), (1, "right")])
def test_a_relation_template_puts_the_first_object_where_it_stands(relation, expected):
    scene = one(numpy_scenes(), 0)._replace(
        kind=1, count=2, relation=relation, shape=np.array([0, 1, 0]),
        colour=np.array([0, 5, 0]), size=np.array([0, 0, 0]), split=np.int32(0),
    )  # fmt: skip
    other = {"left": "right", "right": "left"}[expected]
    rng = np.random.default_rng(0)
    for _ in range(40):
        text: Caption = caption(scene, rng)
        words = text.text
        circle, square = words.index("circle"), words.index("square")
        if f"on its {expected}" in words:  # "a square with a circle on its left"
            assert square < circle, words
        elif words.startswith("on the"):
            clauses = words.split(", ")
            assert ("circle" in clauses[0]) == (f"on the {expected}" in clauses[0]), words
        elif f"on the {other}" in words:  # "a circle on the left and a square on the right"
            assert circle < words.index(f"on the {expected}") < square, words
        else:
            assert circle < words.index(expected) < square, words
