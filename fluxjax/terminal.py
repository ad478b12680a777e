"""Saying things on stdout and stderr, whatever becomes of them and whoever wrote the words."""

from __future__ import annotations

import io
import os
import sys
import unicodedata
from typing import Any

# Other, but not characters for private use (symbols of some fonts) and the joiners of emoji.
_HIDDEN = {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"


def shown(text: str) -> str:
    """`text` with control characters, direction marks and lone surrogates as escapes: \\x1b.

    Names of files, prompts and records come from strangers: on a terminal they could move the
    cursor, retitle the window or hide what is said. A line break before two spaces stays: so our
    own lists are written.
    """
    if text.isascii() and text.isprintable():
        return text
    return "\n  ".join("".join(map(_visible, part)) for part in text.split("\n  "))


def _visible(character: str) -> str:
    hidden = unicodedata.category(character) in _HIDDEN and character not in _JOINERS
    return character.encode("unicode_escape").decode() if hidden else character


def open_standard_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr (`>&-`) empty ones.

    Otherwise the next file that is opened becomes stdout, and prints end up inside it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            stream = io.FileIO(number, mode, closefd=False)
            buffer = io.BufferedReader(stream) if mode == "r" else io.BufferedWriter(stream)
            setattr(sys, name, io.TextIOWrapper(buffer, encoding="utf-8"))


def print_line(text: str) -> None:
    """One line on stdout.

    Where nobody reads it any more (`| head -1`) or the disk is full, the work goes on without it:
    what follows is printed nowhere, a full disk is said once.
    """
    error = _write(sys.stdout, text)
    if error is not None:
        _discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            say(f"note: nothing more is printed: {error.strerror or error}")


def say(text: str) -> None:
    """One line on stderr, which never ends the work that it speaks of."""
    if _write(sys.stderr, text) is not None:
        _discard(sys.stderr)


def _write(stream: Any, text: str) -> OSError | None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        # What the terminal's encoding lacks is shown as an escape too.
        text = shown(text).encode(encoding, "backslashreplace").decode(encoding)
        stream.write(f"{text}\n")
        stream.flush()
    except OSError as error:
        return error
    except ValueError as error:  # a stream that somebody has closed
        return OSError(str(error))
    return None


def _discard(stream: Any) -> None:
    """What is left in the stream's buffer, and all that follows, goes nowhere."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()
    except (OSError, ValueError, io.UnsupportedOperation):
        pass


class Lenient:
    """A stream for words at the side of the work (stderr): what cannot be written is lost."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            _discard(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            _discard(self._stream)
