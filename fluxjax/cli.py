"""How every command of this project ends: an exit code, and for a mistake one sentence."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from fluxjax.terminal import open_standard_streams, say

TRACEBACK_VARIABLE = "FLUXJAX_TRACEBACK"

_NO_HOME = "Could not determine home directory."  # pathlib, of ~nosuchuser

# Called with the exit code when a command has failed and said so, before the interpreter ends.
on_failure: list[Callable[[int], None]] = []


def sentence(error: BaseException) -> str:
    """What went wrong in words; for errors of the operating system, which file and why."""
    if isinstance(error, OSError) and error.strerror:
        where = error.filename2 or error.filename
        return f"{where}: {error.strerror}" if where else error.strerror
    if isinstance(error, RuntimeError) and str(error) == _NO_HOME:
        return "a path begins with ~ and a name, and there is no user of that name"
    if isinstance(error, MemoryError):
        return "out of memory: try a smaller picture, fewer pictures at once or --dtype bfloat16"
    text = str(error).strip()
    if "RESOURCE_EXHAUSTED" in text:
        return "the device is out of memory: try a smaller picture or --dtype bfloat16" + (
            f" ({text.splitlines()[0]})"
        )
    return text or type(error).__name__


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit with its code (None is 0).

    A mistake of the user (ValueError, which ConfigError is, OSError, MemoryError, or a device out
    of memory) is printed as `error: ...` on stderr with exit code 2, or the error's `exit_code`;
    Ctrl-C exits with 130. With FLUXJAX_TRACEBACK=1 the traceback is shown instead. Any other
    exception is a bug and is raised.
    """
    open_standard_streams()
    try:
        code = main() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        say("")  # the terminal has written ^C
        say("interrupted")
        # Threads may still compute or compile; waiting for them is not what Ctrl-C asks for.
        os._exit(130)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nothing more to say, also not at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        known = not isinstance(error, RuntimeError) or any(
            words in str(error) for words in ("RESOURCE_EXHAUSTED", _NO_HOME)
        )
        if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0") or not known:
            _fail(1, traceback.format_exc())
            raise
        say(f"error: {sentence(error)}")
        code = getattr(error, "exit_code", 2)
        _fail(code)
    except Exception:
        _fail(1, traceback.format_exc())
        raise
    sys.exit(code)


def _fail(code: int, text: str = "") -> None:
    """For those who end the process themselves, after printing what Python would have printed."""
    if on_failure:
        print(text, file=sys.stderr, end="", flush=True)
    for action in on_failure:
        action(code)
