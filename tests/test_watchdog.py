"""A step that hangs ends the process, also where the interpreter itself is locked."""

import subprocess
import sys

import pytest

from fluxjax.train.watchdog import HUNG


def run(body: str) -> subprocess.CompletedProcess:
    program = (
        "import ctypes, time\n"
        "from fluxjax.train.watchdog import Watchdog\n"
        f"with Watchdog(1.5, start=10) as watchdog:\n    {body}\nprint('end')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("for _ in range(8): watchdog.beat(); time.sleep(0.3)", 0, ""),
        ("time.sleep(2.5)", 0, ""),  # the first step may take longer
        ("watchdog.beat(10); time.sleep(2.5)", 0, ""),  # and so may one that says so
        ("watchdog.beat(); time.sleep(30)", HUNG, "no step within"),
        # sleep() called with the interpreter locked, as by native code that is stuck.
        pytest.param(
            "watchdog.beat(); time.sleep(1.2); ctypes.PyDLL(None).sleep(30)",
            1,
            "Timeout",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_only_silence_ends_the_process(body, code, words):
    ended = run(body)
    assert ended.returncode == code, ended.stderr
    assert words in ended.stderr
    assert ("<string>" in ended.stderr) == bool(code), "the stacks are missing"
    assert ended.stdout == ("" if code else "end\n")
