"""How every command of this project starts and ends: signals, exit codes, one sentence a mistake.

Light, as is all that stands before `run` in a `__main__`: until then Ctrl-C shows a traceback.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from fluxjax.terminal import Lenient, open_standard_streams, say

if TYPE_CHECKING:
    from collections.abc import Callable

TRACEBACK_VARIABLE = "FLUXJAX_TRACEBACK"

_NARROWEST = 40  # columns; help is laid out without end in a terminal of one
_LONGEST = 20_000  # characters of an error: strangers' files hold values of any length
_COLLECTION = (50_000, 20, 10)  # objects, then rounds; importing and tracing make few cycles
_NO_HOME = "Could not determine home directory."  # pathlib, of ~nosuchuser
_LINKS_IN_A_CIRCLE = "Symlink loop from"  # pathlib's, before Python 3.13


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does, with exit code 143."""


class _Came:
    """The signal that was raised as an exception, also where a library has made another of it: C++
    that was importing, or comparing, says ImportError or ValueError."""

    number: int | None = None


def sentence(error: BaseException) -> str:
    """What went wrong in words; for errors of the operating system, which file and why."""
    if isinstance(error, OSError) and error.strerror:
        where = error.filename2 or error.filename
        return f"{where}: {error.strerror}" if where else error.strerror
    if isinstance(error, RuntimeError) and str(error) == _NO_HOME:
        return "a path begins with ~ and a name, and there is no user of that name"
    if isinstance(error, RuntimeError) and str(error).startswith(_LINKS_IN_A_CIRCLE):
        return f"{str(error).removeprefix(_LINKS_IN_A_CIRCLE).strip()} is a link to itself"
    if isinstance(error, MemoryError):
        return "out of memory: try a smaller picture, fewer pictures at once or --dtype bfloat16"
    text = str(error).strip()
    if "RESOURCE_EXHAUSTED" in text:
        return "the device is out of memory: try a smaller picture or --dtype bfloat16" + (
            f" ({text.splitlines()[0]})"
        )
    return text or type(error).__name__


def is_mistake(error: BaseException) -> bool:
    """Is it the user's (ValueError, which ConfigError is, OSError, no memory), and not a bug?

    With FLUXJAX_TRACEBACK=1 nothing counts as one, so that the traceback is shown.
    """
    if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
        return False
    if isinstance(error, RuntimeError):
        mistakes = "RESOURCE_EXHAUSTED", _NO_HOME, _LINKS_IN_A_CIRCLE
        return any(words in str(error) for words in mistakes)
    return isinstance(error, ValueError | OSError | MemoryError)


def report(error: Exception) -> int:
    """Say on stderr how a command failed; returns its exit code.

    A mistake is `error: ...` and 2, or the error's `exit_code`; a bug is its traceback and 1.
    """
    if is_mistake(error):
        text = sentence(error)
        more = len(text) - _LONGEST
        say(f"error: {text[:_LONGEST]}{f' ... and {more} characters more' if more > 0 else ''}")
        return getattr(error, "exit_code", 2)
    import traceback

    print("".join(traceback.format_exception(error)), file=sys.stderr, end="", flush=True)
    return 1


def begin(*modules: str) -> None:
    """Work begins that must clean up after itself: Ctrl-C and SIGTERM become exceptions.

    Before, while options are read and modules imported, they end the process on the spot.
    `modules` are imported first: raised within C++ that is being imported, an exception can be a
    segmentation fault.
    """
    for name in modules:
        import_module(name)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is _end_now:
            signal.signal(number, _raise)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit with its code (None is 0), after a mistake with that of `report`.

    Ctrl-C exits with 130, SIGTERM with 143. A bug is raised. `--version` is answered here.
    """
    before, stderr, unraisable = _catch_signals(), sys.stderr, sys.unraisablehook
    _Came.number = None
    sys.unraisablehook, collection = _try_again, gc.get_threshold()
    gc.set_threshold(*_COLLECTION)
    try:
        open_standard_streams()
        if shutil.get_terminal_size().columns < _NARROWEST:
            os.environ["COLUMNS"] = str(_NARROWEST)
        sys.stderr = Lenient(sys.stderr)
        code = _version() if "--version" in sys.argv[1:] else main() or 0
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        _farewell(signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nothing more to say, also not at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if _Came.number is not None:
            _farewell(_Came.number)
        if not is_mistake(error):
            raise
        code = report(error)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.stderr, sys.unraisablehook = stderr or sys.stderr, unraisable
        gc.set_threshold(*collection)
    sys.exit(code)


def _farewell(number: int) -> NoReturn:
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)  # a second one must not cut it short
    say("")  # the terminal has written ^C
    say("interrupted" if number == signal.SIGINT else "terminated")
    # Threads may still compute or compile; waiting for them is not what Ctrl-C asks for.
    os._exit(128 + number)


def _version() -> int:
    from fluxjax import __version__

    print(f"fluxjax {__version__}")
    return 0


def _catch_signals() -> dict[int, Any]:
    """Both end the process on the spot; returns what handled them before.

    What is ignored, as in a shell's background process, stays ignored.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    try:
        return {
            number: signal.signal(number, _end_now)
            for number, handler in usual.items()
            if signal.getsignal(number) is handler
        }
    except ValueError:  # in another thread than the main one, which has the signals
        return {}


def _end_now(number: int, frame: Any) -> NoReturn:
    try:
        os.write(2, b"\ninterrupted\n" if number == signal.SIGINT else b"\nterminated\n")
    finally:
        os._exit(128 + number)


def _raise(number: int, frame: Any) -> NoReturn:
    _Came.number = number
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _try_again(lost: sys.UnraisableHookArgs) -> None:
    """A signal that came during garbage collection or in a destructor is raised a moment later."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        return sys.__unraisablehook__(lost)
    from threading import Timer

    number = signal.SIGTERM if issubclass(lost.exc_type, Terminated) else signal.SIGINT
    # Long enough for this hook to be left: raised within it, it would be lost again.
    Timer(0.1, os.kill, (os.getpid(), number)).start()
