"""Who writes to a file or folder, and what a killed process leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fluxjax.lock import InUse, lock_beside, locked

HOLDER = """
import sys, time
from pathlib import Path
from fluxjax.lock import locked
with locked(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_refused_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    file = lock_beside(tmp_path / "model")
    with locked(file, "the model"):
        with (
            pytest.raises(InUse, match=rf"the model is in use by process {os.getpid()} on "),
            locked(file, "the model"),
        ):
            pass
        assert file.exists()
    assert not any(tmp_path.iterdir())
    with locked(file, "the model"):
        pass


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, file], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(InUse, match=f"process {holder.pid} "), locked(file, "it"):
            pass
        holder.send_signal(signal.SIGKILL)
    assert file.exists()  # the file stays, the lock does not
    with locked(file, "it"):
        pass
    assert not file.exists()


def test_of_many_threads_one_at_a_time_is_inside(tmp_path: Path) -> None:
    file, inside, most, entered = tmp_path / ".lock", 0, 0, 0

    def work() -> None:
        nonlocal inside, most, entered
        mine = 0
        while mine < 50:
            try:
                with locked(file, "it"):
                    inside += 1
                    most = max(most, inside)
                    entered, mine = entered + 1, mine + 1
                    inside -= 1
            except InUse:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and entered == 200 and not file.exists()
