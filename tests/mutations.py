"""Valid small files changed as damage, mistakes and hostility change them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

_NUMBERS = (
    b"0",
    b"-1",
    b"1.5",
    b"1e999",
    b"-0.0",
    b"NaN",
    b"1" + b"0" * 400,
    b"1" + b"0" * 5000,
    b"9223372036854775808",
    b"4294967296",
    b"1000000",
)
_VALUES = (
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b'"x"',
    b"[1,2]",
    b'{"a":1}',
    b'"\\ud800"',
    b'"\\u0000"',
    b"[" * 50_000,
    b'{"a":' * 50_000,
    b'"' + b"x" * 100_000 + b'"',
)


def mutated(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """`data` after one to three changes; `other` is what pieces are spliced in from."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        data = chance.choice(_CHANGES)(data, other, chance)
    return data


def _place(data: bytes, chance: random.Random) -> int:
    """Half of them near the start, where headers are."""
    return (
        chance.randrange(min(len(data), 200) if chance.random() < 0.5 else len(data)) if data else 0
    )


def _flip(data: bytes, other: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 4, 40)) if data else 0):
        changed[_place(data, chance)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _set(data: bytes, other: bytes, chance: random.Random) -> bytes:
    at = _place(data, chance)
    return data[:at] + bytes([chance.choice((0, 1, 127, 128, 255))]) * 8 + data[at + 8 :]


def _cut(data: bytes, other: bytes, chance: random.Random) -> bytes:
    return data[: _place(data, chance)]


def _remove(data: bytes, other: bytes, chance: random.Random) -> bytes:
    at = _place(data, chance)
    return data[:at] + data[at + chance.choice((1, 8, 100)) :]


def _duplicate(data: bytes, other: bytes, chance: random.Random) -> bytes:
    at, length = _place(data, chance), chance.choice((1, 8, 512, len(data)))
    return data[: at + length] + data[at:]


def _splice(data: bytes, other: bytes, chance: random.Random) -> bytes:
    return data[: _place(data, chance)] + other[_place(other, chance) :]


def _number(data: bytes, other: bytes, chance: random.Random) -> bytes:
    return _replaced(rb"-?\d+(\.\d+)?", data, chance.choice(_NUMBERS), chance)


def _value(data: bytes, other: bytes, chance: random.Random) -> bytes:
    pattern = rb'"[^"]{0,80}"|\d+(\.\d+)?|true|false|null|\[[^][]{0,200}\]'
    return _replaced(pattern, data, chance.choice(_VALUES), chance)


def _swap(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """One word of it in the place of another."""
    words = [found[0] for found in re.finditer(rb'"[^"]{1,80}"', data[:20_000])]
    return _replaced(rb'"[^"]{1,80}"', data, chance.choice(words), chance) if words else data


def _replaced(pattern: bytes, data: bytes, new: bytes, chance: random.Random) -> bytes:
    places = [found.span() for found in re.finditer(pattern, data[:20_000])]
    if not places:
        return data
    start, end = chance.choice(places)
    return data[:start] + new + data[end:]


_CHANGES: tuple[Callable[[bytes, bytes, random.Random], bytes], ...] = (
    _flip,
    _set,
    _cut,
    _remove,
    _duplicate,
    _splice,
    _number,
    _number,
    _value,
    _value,
    _swap,
)
