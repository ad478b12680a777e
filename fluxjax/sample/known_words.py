"""What the embedded model was trained on, and so what it can draw."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fluxjax.config import ConfigError
from fluxjax.hub import tiny_folder

FILE = "world.json"
EDITS = "the embedded model has not learnt to edit: a reference only disturbs what it draws"


class _World(NamedTuple):
    """world.json; `sizes` and the `frames` of a clip are None where the model says nothing about
    them."""

    words: frozenset[str] = frozenset()
    knows: str = ""
    sizes: dict[str, int] | None = None
    frames: int | None = None


def write_known(
    pipeline: Path,
    knows: str,
    words: Iterable[str],
    buckets: Sequence[tuple[int, int]],
    frames: int | None = None,
) -> None:
    """world.json: words, sizes and frames of the training, so that sampling can say what lies
    outside."""
    sides = [side for bucket in buckets for side in bucket]
    sizes = {
        "least": min(sides),
        "most": max(sides),
        "aspect": round(max(max(bucket) / min(bucket) for bucket in buckets), 2),
        "refused_below": min(sides) * 3 // 4,
        "refused_above": max(sides) * 2,
    }
    clip = {} if frames is None else {"frames": frames}
    world = {"knows": knows, "sizes": sizes, **clip, "words": sorted(words)}
    (pipeline / FILE).write_text(json.dumps(world, indent=1) + "\n")


# Words, with what an apostrophe or a hyphen joins to them, and symbols such as emoji.
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*|[\u2190-\u2bff\U0001f000-\U0001faff]")


def words_of(text: str) -> list[str]:
    """The words of a sentence in small letters, each once, in the order in which they come."""
    folded = unicodedata.normalize("NFKC", text).lower()
    return list(dict.fromkeys(_WORD.findall(folded)))


# What it is told when it edits, beside the words of world.json.
_EDIT_WORDS = frozenset(
    words_of(
        "make, turn, paint, change, put, remove, delete, erase, take away, into, larger, bigger, "
        "smaller, them"
    )
)


def _is_known(word: str, words: frozenset[str]) -> bool:
    """A word, `red-coloured` of two known ones, or `circle's`."""
    owner = re.sub("['\u2019]s$", "", word)
    return all(part in words for part in owner.split("-"))


@cache
def _world(folder: Path) -> _World:
    path = folder / FILE
    if not path.is_file():
        return _World()
    world = json.loads(path.read_text(encoding="utf-8"))
    return _World(
        frozenset(world["words"]), world["knows"], world.get("sizes"), world.get("frames")
    )


def outside(prompt: str, folder: Path | None = None, *, edits: bool = False) -> str:
    """A sentence for a prompt with words that the embedded model has never read; else "".

    `edits`: the prompt says what becomes of a reference.
    """
    world = _world(folder or tiny_folder())
    words = world.words | (_EDIT_WORDS if edits else frozenset())
    unknown = [word for word in words_of(prompt) if not _is_known(word, words)]
    if not world.words or not unknown:
        return ""
    listed = ", ".join(f'"{word}"' for word in unknown[:5])
    if len(unknown) > 5:
        listed += f" and {len(unknown) - 5} more"
    return (
        f"the tiny model never read {listed}; it draws {world.knows}. For anything else draw with "
        "a published checkpoint: --model FOLDER, or its id on a hub (--model ORGANISATION/NAME)"
    )


def outside_sizes(width: int, height: int, folder: Path | None = None) -> str:
    """A sentence for a size that the embedded model has not learnt to draw; else "".

    Raises ConfigError for one so far off that it would show nothing.
    """
    sizes = _world(folder or tiny_folder()).sizes
    if sizes is None:
        return ""
    least, most, aspect = sizes["least"], sizes["most"], sizes["aspect"]
    short, long = sorted((width, height))
    if least <= short and long <= most and long <= aspect * short:
        return ""
    drawn = (
        f"the tiny model draws pictures with sides of {least} to {most} pixels, at most {aspect:g} "
        "times as long as wide"
    )
    if least == most:
        drawn = f"the tiny model draws {least} x {most} pixels"
    if short < sizes["refused_below"] or long > sizes["refused_above"]:
        raise ConfigError(f"{drawn}; of {width} x {height} it would make nothing")
    return f"{drawn}; {width} x {height} may come out wrong"


def outside_frames(frames: int, folder: Path | None = None) -> str:
    """A sentence for a clip longer or shorter than those that the embedded model has learnt to
    draw; else ""."""
    learnt = _world(folder or tiny_folder()).frames
    if learnt in (None, frames):
        return ""
    return f"the tiny model draws clips of {learnt} frames; {frames} may come out wrong"
