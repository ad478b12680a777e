"""Faults that befall a training run: kills, signals, full disks, NaN, lost and stuck processes.

Runs are those of `trainer.py`: the real step, loop, store and hosts with a small transformer, or
with a few leaves where only the run matters.
"""

import dataclasses
import errno
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn_files import write_folder

from fluxjax.checkpoint.training_state import StateStore
from fluxjax.config import ConfigError
from fluxjax.parallel import hosts
from fluxjax.train import loop
from fluxjax.train.step import init_state, make_step
from fluxjax.train.watchdog import HUNG

# Compiles in half the time; the same program runs wherever two runs are compared.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
KILLS = 20
PATIENT = 240.0  # seconds that a busy machine may take to start a run


class Server:
    """Starts runs by forking a process that has imported everything."""

    def __init__(self, folder: Path):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}
        # What a run compiles, those that go on from it load.
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        program = [sys.executable, str(Path(__file__).with_name("trainer.py"))]
        self.folder = folder
        self.process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **request):
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin and stdout
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        return json.loads(stdout.readline())

    def start(self, log: str, *arguments, program: str = "train") -> "Run":
        path = self.folder / f"{log}.txt"
        path.touch()
        words = [str(word) for word in arguments]
        process = self.ask(program=program, arguments=words, log=str(path))
        return Run(self, process, path)


class Run:
    def __init__(self, server: Server, process: int, log: Path):
        self.server, self.process, self.log = server, process, log

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait(self, timeout: float = PATIENT) -> int:
        code = self.server.ask(wait=self.process, timeout=timeout)
        if code is None:
            os.kill(self.process, signal.SIGKILL)
            raise AssertionError(f"it did not end within {timeout} s:\n{self.said}")
        return code

    def until(self, text: str) -> None:
        end = time.monotonic() + PATIENT
        while not re.search(text, self.said, re.MULTILINE):
            assert time.monotonic() < end, f"{text!r} did not come:\n{self.said}"
            time.sleep(0.01)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.process, number)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("logs"))
    yield server
    server.process.kill()
    server.process.communicate()


def listed(folder: Path) -> list[int]:
    """Announced steps; fails if anything else lies there."""
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    assert all(name.isdecimal() for name in names), names
    return sorted(map(int, names))


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl, strictly: Python's NaN is no JSON."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def losses(folder: Path) -> list[float]:
    assert [row["step"] for row in rows(folder)] == list(range(1, len(rows(folder)) + 1))
    return [row["loss"] for row in rows(folder)]


@pytest.fixture(scope="module")
def straight(server, tmp_path_factory):
    """20 steps of the transformer without a fault: (folder, digest of the state)."""
    folder = tmp_path_factory.mktemp("straight")
    run = server.start("straight", folder)
    assert run.wait() == 0, run.said
    return folder, re.findall("digest (.*)", run.said)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(server, straight, tmp_path):
    run = server.start("killed", tmp_path, "--pause", 0.05)
    run.until("saved step 10")
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert "digest" not in run.said
    again = server.start("again", tmp_path)
    assert again.wait() == 0, again.said
    assert "resumed" in again.said
    assert re.findall("digest (.*)", again.said) == straight[1]
    assert losses(tmp_path) == losses(straight[0])


@pytest.mark.slow
def test_every_kill_during_saves_leaves_a_whole_step(server, tmp_path):
    """Each run saves at every step, and is killed at a random moment; the next one goes on."""
    moments = random.Random(0)
    reached, caught = 0, 0
    for attempt in range(KILLS):
        run = server.start(
            f"kill{attempt}", tmp_path, "--quick", "--save-every", 1, "--steps", 10**6
        )
        run.until("^step" if attempt else "saved step 2$")
        time.sleep(moments.uniform(0, 0.4))
        run.kill()
        assert run.wait() == -signal.SIGKILL, run.said
        if attempt:
            resumed = int(re.findall(r"at step (\d+)$", run.said, re.MULTILINE)[0])
            assert resumed >= reached, "a step that was announced is gone"
            assert "damaged" not in run.said, "a save that was cut off looks like a checkpoint"
        announced = re.findall(r"^saved step (\d+)$", run.said, re.MULTILINE)
        reached = max([reached, *map(int, announced)])
        caught += any((tmp_path / "checkpoints").glob("*.saving"))
    with StateStore(tmp_path / "checkpoints") as store:
        found = store.newest()
        assert found is not None and found.step >= reached
    print(f"{KILLS} kills, {caught} of them while a save was being written")
    assert caught > KILLS / 4, "the kills came while nothing was being saved"


@pytest.mark.slow
def test_a_full_disk_costs_one_checkpoint_not_the_run(server, tmp_path):
    run = server.start("full", tmp_path / "a", "--quick", "--full", 6, 12)
    assert run.wait() == 0, run.said
    assert "warning: step 10 could not be saved: File too large" in run.said
    assert "saved step 10" not in run.said and listed(tmp_path / "a") == [15, 20]
    run = server.start("stays full", tmp_path / "b", "--quick", "--full", 6, 99)
    assert run.wait() == 2
    assert "error: step 20 could not be saved" in run.said and listed(tmp_path / "b") == [5]


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_a_stuck_step_is_ended(server, tmp_path):
    run = server.start("stuck", tmp_path / "a", "--quick", "--stuck", 7, "--hang", 4)
    slow = server.start("slow", tmp_path / "b", "--quick", "--stuck", 2)
    slow.until("^step 2 ")
    slow.kill(signal.SIGTERM)
    slow.until("a second signal ends")
    slow.kill(signal.SIGTERM)
    assert slow.wait(30) == 128 + signal.SIGTERM
    assert run.wait() == HUNG
    assert "no step within" in run.said and "in advance" in run.said, "whose stack is missing"
    assert listed(tmp_path / "a") == [5]


def _small(folder: Path, *, bad: range = range(0), at: tuple[int, int] = (-1, 0), **options):
    """A run in this process; step `at[0]` gets the signal `at[1]`."""
    optimizer = optax.sgd(0.1)

    def loss(params, key, factor):
        return factor * jnp.square(params["w"] - jax.random.normal(key, (3,))).sum()

    step = make_step(loss, optimizer, seed=1, ema_decay=0.9)

    def advance(state, index):
        if index == at[0]:
            os.kill(os.getpid(), at[1])
        return step(state, jnp.nan if index in bad else 1.0)

    state = init_state({"w": jnp.zeros(3)}, optimizer)
    names = {field.name for field in dataclasses.fields(loop.RunSettings)}
    settings = {name: options.pop(name) for name in names & options.keys()}
    settings = loop.RunSettings(**{"steps": 20, "log_every": 5, "folder": folder} | settings)
    identity = options.pop("identity", None)
    return loop.Run(settings, advance, loop.Hooks(**options), identity).to_end(state)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_ends_with_code_0(tmp_path, capsys, number):
    with pytest.raises(loop.Stopped) as stopped:
        _small(tmp_path, at=(6, number))
    assert stopped.value.code == 0
    assert listed(tmp_path) == [7]
    assert "stopped; step 7 is saved" in capsys.readouterr().err
    straight = _small(tmp_path / "straight")
    np.testing.assert_array_equal(_small(tmp_path).params["w"], straight.params["w"])


def test_without_space_for_a_checkpoint_nothing_begins(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OSError, match=r"checkpoints has 0.00 GB free, a checkpoint needs 0.02 GB"):
        _small(tmp_path, started=lambda: pytest.fail("it began"))
    assert not (tmp_path / "metrics.jsonl").exists() and listed(tmp_path) == []


def test_three_updates_that_are_not_finite_are_left_out(tmp_path):
    state = _small(tmp_path, bad=range(8, 11), patience=10)
    assert int(state.skipped) == 3 and np.isfinite(state.params["w"]).all()
    assert [row["skipped"] for row in rows(tmp_path)] == [0, 2, 3, 3]
    assert all(np.isfinite(row["loss"]) for row in rows(tmp_path))


def test_a_hundred_end_the_run_and_the_last_good_checkpoint_stays(tmp_path, capsys):
    with pytest.raises(loop.Diverged) as diverged:
        _small(tmp_path, bad=range(11, 111), patience=20, steps=200, save_every=4)
    assert diverged.value.code == 3
    assert listed(tmp_path) == [4, 8], "what was saved during the bad streak hides the good one"
    words = " ".join(capsys.readouterr().err.split())
    assert "updates in a row were not finite" in words and "is of step 8" in words


@pytest.mark.parametrize("patience", [5, 50])
def test_a_run_of_which_no_update_was_kept_leaves_no_result(tmp_path, capsys, patience):
    with pytest.raises(loop.Diverged) as diverged:
        _small(tmp_path, bad=range(20), patience=patience)
    assert diverged.value.code == 3 and listed(tmp_path) == []
    said = capsys.readouterr().err
    words = "none of the 20 updates was finite" if patience > 20 else "5 updates in a row were not"
    assert words in " ".join(said.split())


def test_a_second_run_in_the_same_folder_is_refused(server, tmp_path):
    first = server.start("first", tmp_path, "--quick", "--steps", 10**6, "--pause", 0.05)
    first.until("saved step 5$")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    second = server.start("second", tmp_path, "--quick", "--recipe", "two")
    assert second.wait() == 2
    assert re.search(rf"error: {tmp_path} is in use by process {first.process} on ", second.said)
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)
    first.kill()
    first.wait()
    again = server.start("again", tmp_path, "--quick", "--steps", 10)
    assert again.wait() == 0, again.said
    assert not list(tmp_path.glob(".*"))


def test_a_run_without_a_terminal_goes_on(tmp_path, monkeypatch):
    """stderr on a full disk, closed, and a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    closed = open(os.devnull, "w")  # noqa: SIM115
    closed.close()
    with open("/dev/full", "w") as full, open(writing, "w") as broken:
        for number, stream in enumerate((full, closed, broken)):
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stderr", stream)
                assert int(_small(tmp_path / str(number), save_every=5).step) == 20
            assert listed(tmp_path / str(number)) == [15, 20]


def test_what_is_beside_the_training_does_not_end_it(tmp_path, capsys):
    """Pictures and files without room, and a log of which a line is no text."""

    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "picture.png")

    _small(tmp_path, steps=10, probe=no_room, probe_every=5, export=no_room, export_every=4)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("picture.png: No space left on device; training goes on") == 4
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "loss": \xff}\n{"step": NaN}\n{"step": 1e999}\n[[[\n')
    _small(tmp_path)
    assert "4 line(s) that are no rows" in " ".join(capsys.readouterr().err.split())
    assert [row["step"] for row in rows(tmp_path)] == [5, 10, 15, 20]


def test_exports_come_at_their_steps_and_when_the_run_is_stopped(tmp_path):
    exported, stopped = [], []
    hooks = {
        "export": lambda state: exported.append(int(state.step)),
        "stopped": lambda state: stopped.append(int(state.step)),
    }
    with pytest.raises(loop.Stopped):
        _small(tmp_path, at=(13, signal.SIGTERM), export_every=5, **hooks)
    assert (exported, stopped) == ([5, 10], [14])
    with pytest.raises(loop.Stopped):  # of weights that nothing was learnt in there is no file
        _small(tmp_path / "b", bad=range(20), at=(13, signal.SIGTERM), **hooks)
    assert stopped == [14]


def test_another_recipe_does_not_go_on_in_the_same_folder(tmp_path):
    _small(tmp_path, identity={"recipe": "aa", "data": "d"})
    with pytest.raises(ConfigError, match=r"step 20 of another run.* in recipe \(aa and bb\)"):
        _small(tmp_path, identity={"recipe": "bb", "data": "d"}, steps=30)
    state = _small(tmp_path, identity={"recipe": "aa", "data": "d"}, steps=30)
    assert int(state.step) == 30


def test_validation_and_metrics_keep_their_own_intervals(tmp_path):
    _small(tmp_path, log_every=4, probe=lambda state: {"seen": int(state.step)}, probe_every=6)
    seen = {row["step"]: row.get("seen") for row in rows(tmp_path)}
    assert seen == {4: None, 6: 6, 8: None, 12: 12, 16: None, 18: 18, 20: 20}


def test_metrics_after_the_step_that_is_resumed_are_dropped(tmp_path):
    _small(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "loss": 7.0}\n{"step": 30, "lo')  # of a run that was killed
    _small(tmp_path, steps=30)
    assert [row["step"] for row in rows(tmp_path)] == [5, 10, 15, 20, 25, 30]
    assert rows(tmp_path)[4]["loss"] != 7.0


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def pair(server: Server, name: str, *arguments, second: tuple = ()) -> list[Run]:
    """Two processes on loopback; `second`: more arguments of the second one."""
    together = "--coordinator", f"localhost:{_free_port()}", "--num-processes", 2
    each = [(*together, "--process-id", i, *arguments) for i in range(2)]
    return [
        server.start(f"{name}-0", *each[0], "--timeout", PATIENT),
        server.start(f"{name}-1", *each[1], "--timeout", PATIENT, *second),
    ]


def _seconds(runs: list[Run]) -> tuple[list[int], float]:
    start = time.monotonic()
    return [run.wait() for run in runs], time.monotonic() - start


@pytest.mark.slow
def test_on_two_processes_a_run_of_one_goes_on_alike(server, straight, tmp_path):
    first = server.start("one", tmp_path, "--steps", 10)
    assert first.wait() == 0, first.said
    runs = pair(server, "two", tmp_path, "--steps", 15)
    assert [run.wait() for run in runs] == [0, 0], runs[0].said + runs[1].said
    assert "resumed" in runs[0].said
    np.testing.assert_allclose(losses(tmp_path), losses(straight[0])[:15], rtol=1e-5)
    assert runs[1].said.count("step") == 0, "only process 0 speaks"


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_sigterm_to_one_of_two_stops_both_at_the_same_step(server, tmp_path, which):
    runs = pair(server, f"term{which}", tmp_path, "--quick", "--steps", 10**6, "--pause", 0.05)
    runs[0].until("saved step 5$")
    runs[which].kill(signal.SIGTERM)
    codes, seconds = _seconds(runs)
    assert codes == [0, 0], runs[0].said + runs[1].said
    assert seconds < 60, seconds
    (step,) = re.findall(r"stopped; step (\d+) is saved", runs[0].said)
    assert listed(tmp_path)[-1] == int(step)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_process_takes_the_other_with_it(server, tmp_path, which):
    runs = pair(server, f"lost{which}", tmp_path, "--quick", "--steps", 10**6, "--save-every", 1)
    runs[0].until("saved step 2$")
    runs[which].kill()
    (code,), seconds = _seconds([runs[1 - which]])
    assert runs[which].wait() == -signal.SIGKILL
    # JAX aborts a process that it tells of the loss before the computation fails.
    assert code in (hosts.ProcessLost.exit_code, -signal.SIGABRT), runs[1 - which].said
    assert seconds < 60, seconds
    with StateStore(tmp_path / "checkpoints") as store:
        assert store.newest() is not None
        assert store.newest().step == store.steps()[-1], "a checkpoint that is not whole is listed"


@pytest.mark.slow
def test_a_process_that_stops_for_less_than_the_limit_is_waited_for(server, tmp_path):
    long = ("--quick", "--steps", 200, "--pause", 0.02, "--silence", 60)
    runs = pair(server, "paused", tmp_path, *long)
    runs[0].until("saved step 5$")
    runs[1].kill(signal.SIGSTOP)
    time.sleep(15)  # above JAX's usual limit of this project, 10
    runs[1].kill(signal.SIGCONT)
    assert [run.wait() for run in runs] == [0, 0], runs[0].said + runs[1].said


@pytest.mark.slow
def test_a_process_that_stops_for_longer_than_the_limit_ends_both(server, tmp_path):
    long = ("--quick", "--steps", 10**6, "--pause", 0.02, "--save-every", 1, "--silence", 4)
    runs = pair(server, "silent", tmp_path, *long)
    runs[0].until("saved step 2$")
    runs[1].kill(signal.SIGSTOP)
    (code,), seconds = _seconds(runs[:1])
    runs[1].kill(signal.SIGCONT)
    ended = hosts.ProcessLost.exit_code, -signal.SIGABRT
    assert code in ended and runs[1].wait() in ended, runs[0].said + runs[1].said
    assert seconds < 60, seconds
    with StateStore(tmp_path / "checkpoints") as store:
        assert store.newest() is not None and store.newest().step == store.steps()[-1]


@pytest.mark.slow
def test_a_stuck_process_ends_both(server, tmp_path):
    runs = pair(server, "hang", tmp_path, "--quick", "--hang", 6, second=("--stuck", 7))
    codes = [run.wait() for run in runs]
    # Whichever of them says it first: JAX ends the other one when it sees that one gone.
    hung = [run.said for run, code in zip(runs, codes, strict=True) if code == HUNG]
    assert hung and 0 not in codes, codes
    assert all("no step within" in said and "most recent call first" in said for said in hung)
    assert listed(tmp_path) == [5]


@pytest.mark.slow
def test_processes_that_do_not_fit_together_are_refused(server, tmp_path):
    here, there = (write_folder(tmp_path / name, 4) for name in ("here", "there"))
    (there / "000.txt").write_text("another caption")
    slow = ("--linger", 1)  # the first must not be gone before it
    recipes = pair(
        server, "recipes", tmp_path / "run", "--quick", second=("--recipe", "two", *slow)
    )
    quick = ("--quick", "--source", here)
    data = pair(server, "data", tmp_path / "run", *quick, second=("--source", there, *slow))
    alone = server.start(
        "alone",
        tmp_path / "run",
        "--quick",
        "--coordinator",
        f":{_free_port()}",
        "--process-id",
        0,
        "--num-processes",
        2,
        "--timeout",
        3,
    )
    for runs, words in ((recipes, r"recipe \(one and two\)"), (data, r"data \(\w+ and \w+\)")):
        for run in runs:
            assert run.wait() == 2, run.said
            assert re.search(f"not started alike, they differ in {words}", run.said), run.said
    assert alone.wait() == hosts.ProcessLost.exit_code
    assert "error: not all 2 processes joined within 3 s (process 0 at" in alone.said
    assert not (tmp_path / "run").exists(), "a run that was refused has begun"
