"""What is said reaches the terminal harmless, and work does not end where nobody listens."""

import os
import subprocess
import sys

import pytest

from fluxjax.terminal import shown

SPEAKER = """
import sys
from fluxjax.cli import run
from fluxjax.terminal import print_line, say
def main():
    for number in range(3):
        print_line(f"line {number} \\u4e2d")
        say(f"note {number}")
    with open("done", "w") as file:
        file.write("all of it")
run(main)
"""


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("\x1b[2J\x07\x7f\x9b", "\\x1b[2J\\x07\\x7f\\x9b"),
        ("a\nb\rc\u2028d", "a\\nb\\rc\\u2028d"),
        ("abc\u202ecba \ud800", "abc\\u202ecba \\ud800"),
        ("2 tensors:\n  one\n  two\x1b", "2 tensors:\n  one\n  two\\x1b"),
        ("café 日本 नमस्ते 👩\u200d🚀\xa0|", "café 日本 नमस्ते 👩\u200d🚀\xa0|"),
    ],
)
def test_control_characters_are_shown_and_not_obeyed(text, safe):
    assert shown(text) == safe


def speak(folder, shell: str) -> tuple[int, str, str]:
    command = ["bash", "-c", f'"$0" -c "$1" {shell}', sys.executable, SPEAKER]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize(
    ("shell", "printed", "said"),
    [
        ("", 3, 3),
        (">&-", 0, 3),
        ("2>&-", 3, 0),
        (">&- 2>&- <&-", 0, 0),
        (">/dev/full", 0, 4),
        ("2>/dev/full", 3, 0),
        ("> >(head -1 >&2; sleep 0.01)", 0, 4),
    ],
)
def test_work_ends_well_whatever_becomes_of_its_words(tmp_path, shell, printed, said):
    if "/dev/full" in shell and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    code, out, error = speak(tmp_path, shell)
    assert code == 0, error
    assert (tmp_path / "done").read_text() == "all of it"
    assert len(out.splitlines()) == printed and len(error.splitlines()) == said, error
    assert "Error" not in error and "Traceback" not in error
    if printed:
        assert "line 0 \\u4e2d" in out


def test_an_error_without_stderr_still_has_its_code(tmp_path):
    program = (
        "from fluxjax.cli import run\n"
        "def main(): raise FileNotFoundError('there is no a\\x1b[2Jb')\n"
        "run(main)\n"
    )
    for shell, said in (("2>&-", b""), ("2>/dev/full", b""), ("", b"error: there is no a\\x1b")):
        command = ["bash", "-c", f'"$0" -c "$1" {shell}', sys.executable, program]
        ended = subprocess.run(command, capture_output=True, timeout=300)
        assert ended.returncode == 2 and ended.stderr.startswith(said)
