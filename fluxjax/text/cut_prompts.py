"""What is said of prompts that are longer than a text encoder reads."""

from __future__ import annotations

from collections.abc import Sequence


def left_out(removed: Sequence[str], length: int) -> list[str]:
    """One line for each prompt whose end was cut off (`TokenIds.removed`), with that end's first
    and last words."""
    return [
        f"the prompt is longer than {length} tokens; left out: {_ends(rest)}"
        for rest in removed
        if rest
    ]


def _ends(text: str, count: int = 6) -> str:
    """Its first and last words, and how many there are; all of it where that is no longer."""
    words = text.split()
    if len(words) <= 2 * count and len(text) <= 200:
        return repr(text)
    first, last = " ".join(words[:count])[:80], " ".join(words[-count:])[-80:]
    return f"{first!r} ... {last!r} ({len(words)} words)"
