"""How commands start: verbs, help, mistakes before slow imports, signals from the first import."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ctrl_c import heeding_ctrl_c

from fluxjax import __version__

ROOT = Path(__file__).parents[1]
VERBS = ("sample", "train", "convert", "diff", "plan")


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def fluxjax(*arguments: str, **options) -> subprocess.CompletedProcess:
    return run("-m", "fluxjax", *arguments, **options)


def test_the_command_names_its_verbs():
    for ended in (fluxjax(), fluxjax("--help")):
        assert ended.returncode == 0 and not ended.stderr
        assert all(f"\n  {verb} " in ended.stdout for verb in VERBS)
        assert max(map(len, ended.stdout.splitlines())) <= 80
    for verb in VERBS:
        assert fluxjax(verb, "--version").stdout == f"fluxjax {__version__}\n"
    assert run("-m", "fluxjax.sample", "--version").stdout == f"fluxjax {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["smaple"], "'smaple' is none of sample, train,"),
        (["smaple"], "did you mean sample?"),
        (["a red circle"], 'fluxjax sample "a red circle"'),
        (["completion"], "name a shell, bash, zsh, tcsh"),
        (["train"], "name a recipe first: fluxjax train RECIPE"),
        (["convert", "a", "b", "--shard-gb", "nan"], "--shard-gb must be a positive number"),
    ],
)
def test_mistakes_in_a_verb_are_one_sentence(arguments, words):
    ended = fluxjax(*arguments)
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.startswith("error: ") and words in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("sample star --width 7", "width must be a multiple of 16, got 7; 16 would do"),
        ("sample star --height 1000", "height must be a multiple of 16, got 1000; 992 would do"),
        ("sample star --steps 0", "steps must be from 1 to 1000, got 0"),
        ("sample star --guidance nan", "guidance must be a number, got nan"),
        ("sample star --number 0", "number must be at least 1"),
        ("sample star --mesh x=2", "a mesh is written as axis=number"),
        ("sample star --reference none.png", "there is no reference picture"),
        ("sample star --lora none.safetensors", "there is no LoRA file"),
        ("sample --prompts none.txt", "there is no file none.txt"),
        ("sample star --wdith 7", "there is no option --wdith; did you mean --width?"),
        ("sample star --width 7.5", "--width must be an integer, got '7.5'"),
        ("sample star --width", "--width needs a value"),
        ("sample star --grid true", "'true' is one argument too many; fluxjax sample --help"),
        ("sample star --dtype half", "--dtype is one of bfloat16, float32; got 'half'"),
        ("train {recipe} --lora.rnk 4", "there is no option --lora.rnk; did you mean --lora.rank?"),
        ("train evaluate --seed x", "--seed must be an integer, got 'x'"),
        ("convert {tiny}", "fluxjax convert needs DESTINATION; fluxjax convert --help"),
        ("diff golde", "'golde' is none of golden, live, bench"),
        ("diff", "fluxjax diff needs one of golden, live, bench; fluxjax diff --help"),
        ("plan dev --batch 0", "batch must be at least 1, got 0"),
        ("plan dev --mesh fsdp=3 --devices 4", "the mesh 'fsdp=3' does not fit 4 devices"),
        ("plan dev --chips abacus", "no chip is called 'abacus'"),
        ("plan dev --task lora --rank 0", "rank must be at least 1, got 0"),
        ("plan {tiny} --width 7", "width must be a multiple of 16, got 7"),
        ("plan nowhere", "'nowhere' is neither a preset"),
        ("train nowhere.toml", "there is no recipe nowhere.toml"),
        ("train /dev/null", "/dev/null is empty: a recipe says"),
        ("train {recipe} --steps -1", "steps must be at least 1, got -1"),
        ("train {recipe} --lora.rank 0", "the LoRA's rank must be from 1 to 65536, got 0"),
        ("train precompute {recipe} --data.resolution 0", "resolution must be above 0"),
        ("train export nowhere", "there is no recipe nowhere/recipe.toml"),
        ("train evaluate --prompts 0", "prompts and batch must be at least 1"),
        ("convert nowhere model", "there is no file nowhere"),
        ("convert {tiny} model --mesh x=2", "a mesh is written as axis=number"),
        ("diff live nowhere", "there is no model folder nowhere"),
        ("diff live {recipe}", "is a file, and this takes a folder: `fluxjax convert"),
        ("diff live --steps 0", "steps must be from 1 to 1000, got 0"),
        ("diff golden none.safetensors", "there is no recorded file none.safetensors"),
        ("diff bench --rounds 0", "--rounds and --threads must be at least 1, got 0"),
    ],
)
def test_a_bad_option_is_refused_before_jax_is_imported(arguments, words):
    places = {"tiny": ROOT / "fluxjax/assets/tiny", "recipe": ROOT / "train/tiny_lora.toml"}
    filled = arguments.format(**places).split()
    ended = run("-X", "importtime", "-m", "fluxjax", *filled)
    assert ended.returncode == 2
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert {"tyro", "fluxjax.config"} <= imported
    slow = {"jax", "torch", "einops", "transformers", "rich.progress"}
    assert not imported & (slow | {"numpy"} if filled[0] == "sample" else slow)
    said = [line for line in ended.stderr.splitlines() if not line.startswith("import time:")]
    assert len(said) == 1 and said[0].startswith("error: ") and words in said[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample"], "--negative-prompt"),
        (["train"], "--optimizer.learning-rate"),
        (["train"], "fluxjax train export RUN"),
        (["train"], "fluxjax train evaluate"),
        (["train", "export"], "--step"),
        (["train", "precompute"], "--data.source"),
        (["train", "evaluate"], "--prompts"),
        (["convert"], "DESTINATION"),
        (["diff"], "golden"),
        (["diff", "live"], "--component"),
        (["plan"], "--chips"),
    ],
)
def test_help_fits_a_pipe_of_80_columns(arguments, words):
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    ended = fluxjax(*arguments, "--help", env=environment)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0].startswith(f"usage: fluxjax {' '.join(arguments)}") and words in ended.stdout
    assert max(map(len, lines)) <= 80, max(lines, key=len)


def test_completion_knows_every_verb_and_its_options(tmp_path):
    script = tmp_path / "completion.bash"
    script.write_text(fluxjax("completion", "bash").stdout)
    asked = (
        "",
        "train e",
        "train recipe.toml --optimizer.l",
        "train export --st",
        "train precompute recipe.toml --optimizer.l",
        "train evaluate --held",
        "train --sil",
    )
    program = f"source {script}\n"
    for words in asked:
        line = ["fluxjax", *words.split(" ")]
        program += f"COMP_WORDS=({' '.join(w or chr(34) * 2 for w in line)})\n"
        program += f'COMP_CWORD={len(line) - 1}; _tyro_fluxjax; echo "${{COMPREPLY[@]}}"\n'
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "-c", program], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    verbs, *rest = ended.stdout.splitlines()
    assert set(VERBS) <= set(verbs.split())
    rate = "--optimizer.learning-rate"
    held = "--held-out"
    assert rest == ["evaluate export", rate, "--step", rate, held, "--silence"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("awaited", ["fluxjax.cli", "tyro", "fluxjax.config", "jax", "flax"])
def test_a_signal_ends_a_command_from_its_first_import_on(awaited, number, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "fluxjax", "sample", "a star"]
    running = subprocess.Popen(
        heeding_ctrl_c(command),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None
    for line in running.stderr:
        if line.rpartition("|")[2].strip() == awaited:
            break
    time.sleep(0.05)
    running.send_signal(number)
    with running.stderr:
        rest = running.stderr.read()
    assert running.wait(30) == 128 + number
    assert "Traceback" not in rest and "ignored" not in rest, rest
    assert rest.splitlines()[-1] == ("interrupted" if number == signal.SIGINT else "terminated")


WORK = """
import sys, time
from fluxjax import cli
def main():
    cli.begin()
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        open("cleaned", "w").close()
cli.run(main)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_work_that_has_begun_cleans_up_after_a_signal(tmp_path, number, code):
    running = subprocess.Popen(
        heeding_ctrl_c([sys.executable, "-c", WORK]),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None and running.stdout.readline() == "begun\n"
    running.send_signal(number)
    _, error = running.communicate(timeout=300)
    assert running.returncode == code and "Traceback" not in error
    assert (tmp_path / "cleaned").exists()


def test_a_signal_during_garbage_collection_is_not_lost():
    program = (
        "import gc, signal, sys, time\n"
        "from fluxjax import cli\n"
        "def stop(*_): signal.raise_signal(int(sys.argv[1]))\n"
        "def main():\n"
        "    cli.begin()\n"
        "    gc.callbacks.append(stop)\n"
        "    gc.collect()\n"
        "    gc.callbacks.remove(stop)\n"
        "    time.sleep(20)\n"
        "cli.run(main)\n"
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        command = heeding_ctrl_c([sys.executable, "-c", program, str(int(number))])
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 128 + number and len(ended.stderr.split()) == 1, ended.stderr


def test_a_signal_is_one_also_where_a_library_makes_another_error_of_it():
    """C++ that is imported says "initialization failed", one that compares leaves a ValueError."""
    program = (
        "import signal, sys\n"
        "from fluxjax import cli\n"
        "def main():\n"
        "    cli.begin()\n"
        "    try: signal.raise_signal(int(sys.argv[1]))\n"
        "    except KeyboardInterrupt: raise {}('initialization failed') from None\n"
        "cli.run(main)\n"
    )
    for number, error in ((signal.SIGINT, "ImportError"), (signal.SIGTERM, "ValueError")):
        words = [sys.executable, "-c", program.format(error), str(int(number))]
        ended = subprocess.run(heeding_ctrl_c(words), capture_output=True, text=True, timeout=300)
        assert ended.returncode == 128 + number and len(ended.stderr.split()) == 1, ended.stderr


def test_a_bar_on_a_full_disk_ends_no_run(tmp_path):
    program = (
        "from fluxjax.cli import run\n"
        "def main():\n"
        "    from rich.console import Console\n"
        "    for i in range(3): Console(stderr=True).print('step', i)\n"
        "    open('done', 'w').close()\n"
        "run(main)\n"
    )
    command = f'{sys.executable} -c "{program}" 2>/dev/full'
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, timeout=300).returncode == 0
    assert (tmp_path / "done").exists()
