"""Captions: what they say, in every manner, and what they leave open."""

import re
from functools import cache

import jax
import numpy as np
import pytest

from fluxjax.train.embedded import phrases, phrasing
from fluxjax.train.embedded import scenes as world
from fluxjax.train.embedded.phrasing import MANNERS, Caption, captions, captions_and_plain, vary
from fluxjax.train.embedded.scenes import Scene, sample_scenes

N = 256


@cache
def numpy_scenes() -> Scene:
    drawn = sample_scenes(jax.random.key(0), N, width=96, height=96)
    return Scene(*(np.asarray(field) for field in drawn))


def one(scenes: Scene, i: int) -> Scene:
    return Scene(*(field[i] for field in scenes))


def every(words) -> str:
    return rf"\b({'|'.join(re.escape(word) for word in words)})\b"


SIZES = [word for words in phrases.SIZE_WORDS for word in words]


def meant(scene: Scene, name: str) -> set[str]:
    """The words that a span of this name may hold."""
    kind, i = name[0], int(name[1:] or 0)
    if kind == "n":
        count = int(scene.count)
        return {*phrases.NUMBERS[count], *phrases.BARE_NUMBERS[count]}
    if kind == "z":
        return set(phrases.SIZE_WORDS[scene.size[i]])
    if kind == "s":
        shape = world.SHAPES[scene.shape[i]]
        words = phrases.SHAPE_WORDS.get(shape, (shape,))
        counted = world.KINDS[scene.kind] == "count"
        return {phrasing._plural(word) if counted else word for word in words}
    if kind == "b":
        back = list(world.BACKGROUNDS)[scene.background[i]]
        return set(phrases.BACKGROUND_WORDS.get(back, (back,)))
    colour = list(world.COLOURS)[scene.colour[i]]
    return set(phrases.COLOUR_WORDS.get(colour, (colour,)))


@pytest.mark.slow
def test_the_same_seed_writes_the_same_captions_and_another_others():
    scenes = numpy_scenes()
    assert captions(scenes, 3) == captions(scenes, 3)
    assert captions(scenes, 3) != captions(scenes, 4)


@pytest.mark.parametrize("manner", MANNERS)
def test_a_caption_names_what_the_scene_holds_and_no_more(manner):
    scenes = numpy_scenes()
    for i, (said, plain) in enumerate(captions_and_plain(scenes, 1, manner)):
        scene, counted = one(scenes, i), world.KINDS[scenes.kind[i]] == "count"
        for caption in (said, plain):
            text = caption.text
            found = {name: text[a:b] for name, (a, b) in caption.spans.items()}
            assert all(word in meant(scene, name) for name, word in found.items()), (text, found)
            named = 1 if counted else int(scene.count)
            backs = (2 if scene.split else 1) if caption.states_background else 0
            sizes = sum(caption.states_size[:named])
            for kind, n in (("c", named), ("s", named), ("z", sizes), ("b", backs)):
                assert sum(name[0] == kind for name in found) == n, (text, kind)
            # No word of these kinds stands anywhere else.
            assert len(re.findall(every(SIZES), text)) == sizes, text
            other = re.sub("navy blue", "navy", text)
            hues = {*world.COLOURS, *world.BACKGROUNDS, "violet", "turquoise", "grey"}
            assert len(re.findall(every(hues), other)) == named + backs, text
            assert "{" not in text and "  " not in text and text == text.strip(), text
            assert not re.search("[\x00-\x1f]", text), text
            assert not re.search(r"\b(a [aeiou]|an [^aeiou]|there is (two|three|2|3))", text), text
        assert said.spans.keys() - {"n"} == plain.spans.keys() - {"n"}
        assert said.states_size == plain.states_size


# How a text says which of two things comes first from the left or from the top: {0} does.
_FIRST = (
    r"{0}\W+(is |lies )?(to |to the |on the |on )?(left side of|left of)\W+{1}",
    r"{1}\W+(is |lies )?(to |to the |on the |on )?(right side of|right of)\W+{0}",
    r"{0}\W+(is |lies )?(above|over|on top of|higher than)\W+{1}",
    r"{1}\W+(is |lies )?(below|under|beneath|underneath)\W+{0}",
    r"^(to the )?left of\W+{1}\W+(there is|is|we see)?\W*{0}",
    r"^(to the )?right of\W+{0}\W+(there is|is|we see)?\W*{1}",
    r"^(above|over|on top of)\W+{1}\W+(there is|is)?\W*{0}",
    r"^(below|under|beneath|underneath)\W+{0}\W+(there is|is|we see)?\W*{1}",
    r"{0}\W+(with |has |and )?\W*(to its right\W+{1}|{1} on its right)",
    r"{1}\W+(with |has |and )?\W*(to its left\W+{0}|{0} on its left)",
    r"{0}\W+(with |has |and )?\W*(under it\W+{1}|{1} below it|{1} underneath)",
    r"{1}\W+(with |has |and )?\W*(above it\W+{0}|{0} above it)",
    r"{0}\W+(to the |on the |on )?left\W+(and )?{1}\W+(to the |on the |on )?right",
    r"{1}\W+(to the |on the |on )?right\W+(and )?{0}\W+(to the |on the |on )?left",
    r"^(on the )?left\W+{0}\W+(on the )?right\W+{1}",
    r"^(on the )?right\W+{1}\W+(on the )?left\W+{0}",
    r"{0}\W+(at the |on )?(top|above)\W+(and )?{1}\W+(at the )?(bottom|below)",
    r"{1}\W+(at the )?(bottom|below)\W+(and )?{0}\W+(at the |on )?(top|above)",
    r"^(at the )?top\W+{0}\W+(at the )?bottom\W+{1}",
    r"^(at the )?bottom\W+{1}\W+(at the )?top\W+{0}",
)


def said_first(text: str) -> set[str]:
    """Which of circle and square comes first, read with patterns of the test's own."""
    bare = re.sub(r"\b(an?|red|blue|colou?red)\b ?|(that is|,) (red|blue)", "", text)
    bare = re.sub(r" +", " ", bare)
    ways = (("circle", "square"), ("square", "circle"))
    return {
        a
        for a, b in ways
        for way in _FIRST
        if re.search(way.replace("{0}", a).replace("{1}", b), bare)
    }


@pytest.mark.parametrize("manner", ["sentence", "terse", "order"])
@pytest.mark.parametrize("relation", range(4))
def test_a_relation_puts_each_object_where_it_stands(manner, relation):
    scene = one(numpy_scenes(), 0)._replace(
        kind=1,
        count=2,
        relation=relation,
        shape=np.array([0, 1, 0]),
        colour=np.array([0, 5, 0]),
        size=np.array([0, 0, 0]),
        split=np.int32(0),
    )
    first = ("circle", "square")[relation % 2]
    templates = {"sentence": phrases.SENTENCES, "terse": phrases.TERSE}
    for template in templates.get(manner, phrases.FRONTED)[relation]:
        text = template.format(a="a red circle", b="a blue square")
        assert said_first(text) == {first}, text
    rng = np.random.default_rng(0)
    for _ in range(20):
        said, plain = phrasing.caption_and_plain(scene, rng, manner)
        assert said.relations == (relation,)
        kept = re.split(r",? (?:on|against|in front of) ", plain.text)[0]
        assert kept.index(first) < kept.index({"circle": "square", "square": "circle"}[first])


def test_objects_named_without_a_relation_stand_from_left_to_right():
    scenes = numpy_scenes()
    asked = 0
    for i, (said, plain) in enumerate(captions_and_plain(scenes, 2, "and")):
        scene = one(scenes, i)
        if world.KINDS[scene.kind] != "pair":
            continue
        if not phrasing.names_in_order(scene):
            assert said.relations == (int(scene.relation),), said.text
            continue
        asked += 1
        assert said.relations in ((), (0, 1)), said.text
        in_text = sorted((0, 1), key=lambda k: said.spans[f"s{k}"])
        assert in_text == sorted((0, 1), key=lambda k: scene.centre[k, 0]), said.text
        assert "to the left of" in plain.text
    assert asked > 30


def test_what_people_mistype_keeps_its_spans():
    rng = np.random.default_rng(0)
    said = captions(numpy_scenes(), 4)
    wrong = 0
    for caption in said:
        typed = vary(caption, rng, typos=1.0)
        assert typed.spans.keys() == caption.spans.keys()
        changed = [
            name
            for name, (a, b) in typed.spans.items()
            if typed.text[a:b].lower() != caption.text[slice(*caption.spans[name])]
        ]
        assert len(changed) <= 1, (typed.text, changed)
        wrong += typed.text.lower().rstrip(".") != caption.text
        same = vary(caption, rng, typos=0.0)
        assert same.text.lower().rstrip(".") == caption.text
    assert wrong > 0.8 * N
    texts = [vary(caption, rng, typos=0.0).text for caption in said]
    assert {text.isupper() for text in texts} == {True, False}
    assert len({text[0].isupper() for text in texts}) == 2


def test_a_plain_caption_is_one_of_its_own_manner():
    caption: Caption = captions(numpy_scenes(), 5, "sentence")[0]
    scene = one(numpy_scenes(), 0)
    again = phrasing.plain(scene, caption.states_size, caption.states_background)
    assert again == phrasing.plain(scene, caption.states_size, caption.states_background)
