"""What the embedded model was trained on, and so what it can draw."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from fluxjax.hub import tiny_folder

FILE = "world.json"
EDITS = "the embedded model has not learnt to edit: a reference only disturbs what it draws"


def words_of(text: str) -> set[str]:
    """The words of a sentence in small letters."""
    return set(re.findall(r"[^\W_]+(?:-[^\W_]+)*", text.lower()))


@cache
def _world(folder: Path) -> tuple[frozenset[str], str]:
    path = folder / FILE
    if not path.is_file():
        return frozenset(), ""
    world = json.loads(path.read_text(encoding="utf-8"))
    return frozenset(world["words"]), world["knows"]


def outside(prompt: str, folder: Path | None = None) -> str:
    """A sentence for a prompt with words that the embedded model has never read; else ""."""
    words, knows = _world(folder or tiny_folder())
    unknown = sorted(words_of(prompt) - words, key=prompt.lower().find)
    if not words or not unknown:
        return ""
    listed = ", ".join(f'"{word}"' for word in unknown[:5])
    return (
        f"the tiny model never read {listed}; it draws {knows}. For anything else convert a FLUX.1 "
        "checkpoint (python -m fluxjax.convert SOURCE DESTINATION) and draw with "
        "--model DESTINATION"
    )
