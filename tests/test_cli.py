"""Every command ends with an exit code and, for a mistake, one sentence."""

import os
import subprocess
import sys

import pytest

from fluxjax.cli import run, sentence
from fluxjax.config import ConfigError


def code_of(main) -> int:
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def failing(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_code_is_passed_on(returned, code):
    assert code_of(lambda: returned) == code


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConfigError("width must be a multiple of 16, got 33"), "got 33"),
        (FileNotFoundError("there is no folder x"), "there is no folder x"),
        (OSError(28, "No space left on device", "out/a.png"), "out/a.png: No space left"),
        (PermissionError(13, "Permission denied", "/root/x"), "/root/x: Permission denied"),
        (MemoryError(), "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "device is out of"),
        (RuntimeError("Symlink loop from '/a'"), "'/a' is a link to itself"),
        (ValueError("got " + "2, " * 10**6), "got 2, 2, "),
    ],
)
def test_mistakes_are_one_sentence(capsys, error, words):
    assert code_of(failing(error)) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and words in printed.err
    assert len(printed.err.splitlines()) == 1 and not printed.out
    assert len(printed.err) < 21_000
    assert words in sentence(error)


def test_bugs_keep_their_traceback(monkeypatch):
    for bug in (RuntimeError("a bug"), KeyError("a")):
        with pytest.raises(type(bug)):
            run(failing(bug))
    monkeypatch.setenv("FLUXJAX_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        run(failing(ConfigError("wrong")))


def test_ctrl_c_is_130_even_while_a_thread_computes():
    program = (
        "import threading, time\n"
        "from fluxjax.cli import run\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "def main(): raise KeyboardInterrupt\n"
        "run(main)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=300)
    assert ended.returncode == 130
    assert ended.stderr.strip() == b"interrupted"


def test_a_reader_that_leaves_is_no_error():
    program = (
        "from fluxjax.cli import run\n"
        "def main():\n"
        "    for i in range(100000): print(i)\n"
        "run(main)\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, timeout=300
    )
    os.close(writing)
    assert ended.returncode == 0 and not ended.stderr


def test_importing_the_package_is_light():
    program = (
        "import sys, fluxjax\n"
        "heavy = {'jax', 'flax', 'numpy', 'torch', 'transformers', 'tyro'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'load_pipeline' in dir(fluxjax)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


@pytest.mark.parametrize("columns", ["1", "10"])
def test_help_ends_in_the_narrowest_terminal(columns):
    done = subprocess.run(
        [sys.executable, "-m", "fluxjax.convert", "--help"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"COLUMNS": columns},
    )
    assert done.returncode == 0 and "--overwrite" in done.stdout
