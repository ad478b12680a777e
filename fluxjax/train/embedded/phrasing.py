"""Captions: what people type when they want a scene, from whole sentences to a few bare words.

A caption is written in one of MANNERS. Its meaning is that of one plain sentence, `plain`, in which
its words of colour, size, shape, number and background have their counterparts: `spans` of both say
where. Objects that are named without a relation ("a red circle and a blue square") stand from left
to right in the order in which they are named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fluxjax.train.embedded import phrases
from fluxjax.train.embedded.scenes import BACKGROUNDS, COLOURS, KINDS, SHAPES, Scene

MANNERS = ("sentence", "terse", "and", "order")
MANNER_PROBABILITIES = (0.34, 0.26, 0.12, 0.28)
LONGEST = 29  # words and signs of a caption: T5 reads 32 tokens, and a rare word may be two

_TAG = re.compile("\x02(\\w+)\x03([^\x04]*)\x04")


class Caption(NamedTuple):
    """A text, and which attributes it states (what it leaves out is free).

    `relations`: indices into RELATIONS that are right for a pair, () where none is stated.
    `spans`: (start, stop) in `text` of the words for colour c0, size z0 and shape s0 of object 0
    (and so on), number n and backgrounds b0, b1.
    """

    text: str
    states_size: tuple[bool, bool, bool]
    states_background: bool
    relations: tuple[int, ...]
    spans: dict[str, tuple[int, int]]


class _Said(NamedTuple):
    """How a caption was put together, before its tags are taken out."""

    text: str
    sizes: tuple[bool, bool, bool]
    background: bool
    relations: tuple[int, ...]

    def caption(self) -> Caption:
        spans, text, end = {}, "", 0
        for found in _TAG.finditer(self.text):
            text += self.text[end : found.start()]
            spans[found[1]] = (len(text), len(text) + len(found[2]))
            text, end = text + found[2], found.end()
        text += self.text[end:]
        return Caption(text, self.sizes, self.background, self.relations, spans)


def _tag(name: str, word: str) -> str:
    return f"\x02{name}\x03{word}\x04"


def _seen(tagged: str) -> str:
    return _TAG.sub(r"\2", tagged)


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def with_article(phrase: str) -> str:
    """`a red circle`, `an orange circle`."""
    return ("an " if _seen(phrase)[0] in "aeiou" else "a ") + phrase


def _plural(word: str) -> str:
    return phrases.PLURALS.get(word, word + "s")


class _Words(NamedTuple):
    """The words for one scene; with `plain` always the first of each list."""

    scene: Scene
    rng: np.random.Generator
    plain: bool

    def choose(self, options: Sequence[str]) -> str:
        return options[0] if self.plain else _pick(self.rng, options)

    @property
    def kind(self) -> str:
        return KINDS[int(self.scene.kind)]

    def colour(self, i: int) -> str:
        name = list(COLOURS)[int(self.scene.colour[i])]
        return _tag(f"c{i}", self.choose(phrases.COLOUR_WORDS.get(name, (name,))))

    def size(self, i: int) -> str:
        return _tag(f"z{i}", self.choose(phrases.SIZE_WORDS[int(self.scene.size[i])]))

    def shape(self, i: int) -> str:
        name = SHAPES[int(self.scene.shape[i])]
        word = self.choose(phrases.SHAPE_WORDS.get(name, (name,)))
        return _tag(f"s{i}", _plural(word) if self.kind == "count" else word)

    def backgrounds(self) -> list[str]:
        names = [list(BACKGROUNDS)[int(i)] for i in self.scene.background]
        return [
            _tag(f"b{i}", self.choose(phrases.BACKGROUND_WORDS.get(name, (name,))))
            for i, name in enumerate(names)
        ]

    def noun(self, i: int, sized: bool, after: float) -> str:
        """Object i: `large green star`, or with chance `after` in another order of words."""
        colour, shape = self.colour(i), self.shape(i)
        size = self.size(i) if sized else ""
        if self.plain or self.rng.random() >= after:
            return f"{size} {colour} {shape}".strip()
        both = f"{size} and {colour}" if sized else colour
        forms = [
            f"{colour} {size} {shape}" if sized else f"{colour} colored {shape}",
            f"{size} {shape} in {colour}".strip(),
            f"{size} {shape} of {colour} {_pick(self.rng, ('color', 'colour'))}".strip(),
            f"{size} {colour} coloured {shape}".strip(),
        ]
        if self.kind in ("single", "count"):
            forms += [f"{shape}, {size} {colour}" if sized else f"{shape}, {colour}"]
            be = "is" if self.kind == "single" else "are"
            forms += [f"{shape}, {both}", f"{shape} that {be} {both}", f"{shape}, {both}"]
        return _pick(self.rng, forms)


def _objects(words: _Words, sizes: Sequence[bool], *, bare: bool, after: float) -> list[str]:
    """Each named object as it stands in a template: with article or number, or bare."""
    count, kind = int(words.scene.count), words.kind
    if kind == "count":
        noun = words.noun(0, sizes[0], after)
        number = words.choose((phrases.BARE_NUMBERS if bare else phrases.NUMBERS)[count])
        return [f"{_tag('n', number)} {noun}"]
    nouns = [words.noun(i, sizes[i], after) for i in range(count)]
    if bare and kind == "single" and not words.plain and words.rng.random() < 0.15:
        return [f"{_pick(words.rng, phrases.BARE_NUMBERS[1])} {nouns[0]}"]
    if not bare and kind == "single" and not words.plain and words.rng.random() < 0.1:
        return [f"{_pick(words.rng, phrases.NUMBERS[1])} {nouns[0]}"]
    return nouns if bare else [with_article(noun) for noun in nouns]


def _named(template: str, objects: Sequence[str]) -> str:
    return template.format(**dict(zip("abc", objects, strict=False)))


def names_in_order(scene: Scene) -> bool:
    """Whether "X and Y" can mean this scene: its objects stand from left to right."""
    kind = KINDS[int(scene.kind)]
    return kind == "row" or (kind == "pair" and int(scene.relation) < 2)


def _sizes(scene: Scene, rng: np.random.Generator, share: float) -> tuple[bool, bool, bool]:
    kind = KINDS[int(scene.kind)]
    drawn = [kind != "row" and bool(rng.random() < share) for _ in range(3)]
    used = {"single": 1, "pair": 2, "row": 0}.get(kind, 3)
    if kind == "count":
        return drawn[0], drawn[0], drawn[0]
    return (drawn[0] and used > 0, drawn[1] and used > 1, False)


def plain(scene: Scene, sizes: tuple[bool, bool, bool], background: bool) -> Caption:
    """The plain sentence of a scene that states as much."""
    rng = np.random.default_rng(0)
    return _sentence(_Words(scene, rng, True), sizes, background).caption()


def _relation_template(words: _Words, pairs: Sequence[Sequence[str]], rows: Sequence[str]) -> str:
    if words.kind == "pair":
        return words.choose(pairs[int(words.scene.relation)])
    return words.choose(rows) if words.kind == "row" else "{a}"


def _stated(words: _Words) -> tuple[int, ...]:
    return (int(words.scene.relation),) if words.kind == "pair" else ()


def _told_backwards(scene: Scene) -> bool:
    """Whether object 1 of a pair comes first in reading order (left to right, top to bottom)."""
    return KINDS[int(scene.kind)] == "pair" and int(scene.relation) % 2 == 1


def _plain_text(words: _Words, objects: list[str]) -> str:
    if words.kind == "row":
        return _named("{a}, {b} and {c} in a row", objects)
    if words.kind != "pair":
        return objects[0]
    above = int(words.scene.relation) >= 2
    in_order = objects[::-1] if _told_backwards(words.scene) else objects
    return _named("{a} above {b}" if above else "{a} to the left of {b}", in_order)


def _sentence(words: _Words, sizes: tuple[bool, bool, bool], background: bool) -> _Said:
    objects = _objects(words, sizes, bare=False, after=0.0)
    if words.plain:
        text = _plain_text(words, objects)
    else:
        text = _named(_relation_template(words, phrases.SENTENCES, phrases.ROWS), objects)
    if not words.plain and not text.startswith(("on ", "from ")):
        opening = _pick(words.rng, phrases.OPENINGS)
        text = (opening.replace("is", "are") if words.kind == "count" else opening) + text
    if background:
        last = words.choose(phrases.LAST[int(words.scene.split)])
        text += " " + last.format(*words.backgrounds())
    return _Said(text, sizes, background, _stated(words))


def _terse(words: _Words, sizes: tuple[bool, bool, bool], background: bool) -> _Said:
    rng, split = words.rng, int(words.scene.split)
    text = _named(
        _relation_template(words, phrases.TERSE, phrases.TERSE_ROWS),
        _objects(words, sizes, bare=True, after=0.15),
    )
    if words.kind == "count" and rng.random() < 0.1:
        text += " in a row"
    if background:
        colours = words.backgrounds()
        if rng.random() < 0.3:
            text = _pick(rng, phrases.TERSE_FIRST[split]).format(*colours) + text
        else:
            text += _pick(rng, phrases.TERSE_LAST[split]).format(*colours)
    return _Said(text, sizes, background, _stated(words))


def _and(words: _Words, sizes: tuple[bool, bool, bool], background: bool) -> _Said:
    rng, split = words.rng, int(words.scene.split)
    bare = bool(rng.random() < 0.4)
    objects = _objects(words, sizes, bare=bare, after=0.1)
    if _told_backwards(words.scene):
        objects.reverse()
    beside = words.kind == "pair" and rng.random() < 0.4
    pair = phrases.BESIDE if beside else phrases.AND
    template = _pick(rng, phrases.AND_ROWS if words.kind == "row" else pair)
    text = _named(template, objects)
    if background:
        colours = words.backgrounds()
        if rng.random() < 0.25:
            first = phrases.TERSE_FIRST if bare else phrases.FIRST
            text = _pick(rng, first[split]).format(*colours) + text
        elif bare:
            text += _pick(rng, phrases.TERSE_LAST[split]).format(*colours)
        else:
            text += " " + _pick(rng, phrases.LAST[split]).format(*colours)
    return _Said(text, sizes, background, (0, 1) if beside else ())


def _order(words: _Words, sizes: tuple[bool, bool, bool], background: bool) -> _Said:
    rng, split = words.rng, int(words.scene.split)
    first = background and rng.random() < 0.55
    fronted = words.kind in ("pair", "row") and rng.random() < (0.35 if first else 0.8)
    after = 0.25 if first or fronted else 1.0
    objects = _objects(words, sizes, bare=False, after=after)
    pairs, rows = phrases.SENTENCES, phrases.ROWS
    if fronted:
        pairs, rows = phrases.FRONTED, phrases.FRONTED_ROWS
    text = _named(_relation_template(words, pairs, rows), objects)
    if background:
        colours = words.backgrounds()
        if first:
            opening = _pick(rng, phrases.FIRST[split]).format(*colours)
            text = (
                opening.replace("there is", "there are") if words.kind == "count" else opening
            ) + text
        else:
            text += " " + _pick(rng, phrases.LAST[split]).format(*colours)
    return _Said(text, sizes, background, _stated(words))


_WRITERS = {"sentence": _sentence, "terse": _terse, "and": _and, "order": _order}


def caption(scene: Scene, rng: np.random.Generator, manner: str | None = None) -> Caption:
    """Describe one scene (fields as numpy, no leading axis), by default in a manner of chance.

    "and" falls back to another manner for scenes that it cannot mean.
    """
    return caption_and_plain(scene, rng, manner)[0]


def caption_and_plain(
    scene: Scene, rng: np.random.Generator, manner: str | None = None
) -> tuple[Caption, Caption]:
    """A caption, and the plain sentence that says the same."""
    if manner is None:
        manner = str(rng.choice(MANNERS, p=MANNER_PROBABILITIES))
    if manner == "and" and not names_in_order(scene):
        manner = "terse" if rng.random() < 0.5 else "order"
    sizes = _sizes(scene, rng, {"sentence": 0.6, "terse": 0.35}.get(manner, 0.45))
    background = bool(rng.random() < 0.55)
    while True:
        said = _WRITERS[manner](_Words(scene, rng, False), sizes, background).caption()
        if len(re.findall(r"\w+|[^\w\s]", said.text)) <= LONGEST:
            return said, plain(scene, sizes, background)


def captions(scenes: Scene, seed: int, manner: str | None = None) -> list[Caption]:
    """One caption for each of many scenes; the same seed gives the same texts."""
    return [caption for caption, _ in captions_and_plain(scenes, seed, manner)]


def captions_and_plain(
    scenes: Scene, seed: int, manner: str | None = None
) -> list[tuple[Caption, Caption]]:
    """One caption for each of many scenes, and the plain sentence that says the same."""
    arrays = Scene(*(np.asarray(v) for v in scenes))
    rng = np.random.default_rng(seed)
    return [
        caption_and_plain(Scene(*(v[i] for v in arrays)), rng, manner)
        for i in range(len(arrays.kind))
    ]


def vary(caption: Caption, rng: np.random.Generator, *, typos: float = 0.1) -> Caption:
    """As people type it: capitals, a full stop, and with chance `typos` a wrong letter."""
    text, spans = caption.text, caption.spans
    if rng.random() < typos:
        text, spans = _mistyped(text, spans, rng)
    case = rng.random()
    if case < 0.2:
        text = text[0].upper() + text[1:]
    elif case < 0.24:
        text = text.title()
    elif case < 0.28:
        text = text.upper()
    if rng.random() < 0.15:
        text += "."
    return caption._replace(text=text, spans=spans)


def _mistyped(
    text: str, spans: dict[str, tuple[int, int]], rng: np.random.Generator
) -> tuple[str, dict[str, tuple[int, int]]]:
    """One word of at least four letters with two letters swapped, or one lost, doubled, wrong."""
    words = list(re.finditer(r"[a-z]{4,}", text))
    if not words:
        return text, spans
    word = words[int(rng.integers(len(words)))]
    letters = list(word[0])
    at = int(rng.integers(1, len(letters) - 1))
    kind = int(rng.integers(4))
    if kind == 0:
        letters[at], letters[at + 1] = letters[at + 1], letters[at]
    elif kind == 1:
        del letters[at]
    elif kind == 2:
        letters.insert(at, letters[at])
    else:
        letters[at] = chr(ord("a") + int(rng.integers(26)))
    longer = len(letters) - len(word[0])
    moved = {
        name: (start + longer * (start >= word.end()), stop + longer * (stop >= word.end()))
        for name, (start, stop) in spans.items()
    }
    return text[: word.start()] + "".join(letters) + text[word.end() :], moved
