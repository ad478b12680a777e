"""Launch scripts, and how a process finds out that it is one of several."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fluxjax.config import ConfigError
from fluxjax.parallel.hosts import bind_address, detect_cluster, differences, join_hosts

TRAIN = Path(__file__).parents[1] / "train"


def until_done(result: Path, program: str) -> subprocess.Popen:
    script = str(TRAIN / "until_done.sh")
    return subprocess.Popen(["sh", script, str(result), sys.executable, "-c", program])


@pytest.mark.parametrize(
    ("program", "there", "code"),
    [("", True, 0), ("", False, 75), ("exit(3)", True, 3), ("exit(5)", False, 5)],
)
def test_until_done_tells_an_interrupted_run_from_a_finished_one(tmp_path, program, there, code):
    result = tmp_path / ("result" if there else "none")
    (tmp_path / "result").touch()
    assert until_done(result, program).wait(300) == code


def test_until_done_hands_sigterm_on_and_waits(tmp_path):
    program = (
        "import signal, sys, time\n"
        "def stop(*_): time.sleep(0.5); open(sys.argv[1], 'w'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"sys.argv.append({str(tmp_path / 'saved')!r})\n"
        f"open({str(tmp_path / 'ready')!r}, 'w')\n"
        "time.sleep(60)\n"
    )
    run = until_done(tmp_path / "result", program)
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait(300) == 75
    assert (tmp_path / "saved").exists()


def test_scripts_are_valid_and_name_what_exists():
    for name, shell in (("slurm.sh", "bash"), ("tpu_pod.sh", "sh"), ("until_done.sh", "sh")):
        subprocess.run([shell, "-n", str(TRAIN / name)], check=True)
    jobs = yaml.safe_load((TRAIN / "gke_jobset.yaml").read_text())["spec"]["replicatedJobs"]
    job = jobs[0]["template"]["spec"]
    words = job["template"]["spec"]["containers"][0]["command"][-1].split()
    assert int(words[words.index("--num-processes") + 1]) == job["parallelism"]
    for path in [word for word in words if word.startswith("train/")]:
        assert (TRAIN.parent / path).is_file()


def test_clusters_are_told_from_one_machine():
    slurm = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}
    assert detect_cluster(slurm) == "SLURM"
    assert detect_cluster({**slurm, "SLURM_NTASKS": "1"}) is None
    assert detect_cluster({"SLURM_NTASKS": "2"}) is None, "a batch script is no task"
    assert detect_cluster({"TPU_WORKER_HOSTNAMES": "a,b"}) == "TPU"
    assert detect_cluster({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    kubernetes = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    assert detect_cluster(kubernetes) == "Kubernetes"
    assert detect_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None
    assert detect_cluster({}) is None


def test_the_coordinator_listens_where_it_was_named():
    assert bind_address(":1234") == bind_address("localhost:1234") == "127.0.0.1:1234"
    assert bind_address("10.0.0.7:1234") == "10.0.0.7:1234"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("localhost:1", None, 2), "go together"),
        (("localhost", 0, 2), "must be HOST:PORT, got 'localhost'"),
        (("localhost:1", 2, 2), "--process-id must be 0 to 1, got 2"),
        (("localhost:1", 0, 0), "--num-processes must be at least 1, got 0"),
    ],
)
def test_half_an_invitation_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        join_hosts(*given)


def test_differences_are_named():
    assert differences({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}) == [
        "b (2 and 3)",
        "c (none and 4)",
    ]
