"""Several processes as one program: joining, agreeing on what runs, asking process 0, stopping."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fluxjax
from fluxjax import cli
from fluxjax.config import ConfigError

BLOCK_BYTES = 1 << 14
SILENCE = 10.0  # seconds; a process that is only slow gives a sign of life all the same
_DAY = 86400
_NAMED = 8  # differences in a sentence
_BARRIERS = itertools.count()
_LOST = re.compile("gloo|nccl|coordination service|connection (closed|reset)", re.IGNORECASE)


class ProcessLost(ConnectionError):
    """Another process of this run is missing or gone; starting all of them again is the remedy."""

    exit_code = 5


def detect_cluster(environment: Mapping[str, str] = os.environ) -> str | None:
    """Which kind of cluster started this process as one of several: SLURM, TPU, ... or None."""

    def several(name: str) -> bool:
        return environment.get(name, "1").isdecimal() and int(environment.get(name, "1")) > 1

    workers = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", ""))
    if "SLURM_STEP_NODELIST" in environment and several("SLURM_NTASKS"):
        return "SLURM"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    if "," in workers or several("MEGASCALE_NUM_SLICES"):
        return "TPU"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    # A TPU VM outside Kubernetes tells by its metadata server, which JAX asks.
    accelerator = any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")))
    skipped = "TPU_SKIP_MDS_QUERY" in environment
    if accelerator and not skipped and "TPU_ACCELERATOR_TYPE" in environment:
        return "TPU"
    return None


def bind_address(coordinator: str) -> str:
    """What the coordinator listens on: its own name or address alone, not every interface."""
    host, _, port = coordinator.rpartition(":")
    return f"{'127.0.0.1' if host in ('', 'localhost') else host}:{port}"


def join_hosts(
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
    *,
    timeout: float = 300.0,
    silence: float = SILENCE,
) -> None:
    """Join the other processes of this run. Call it before anything else of JAX.

    SLURM, GKE, TPU pods and Open MPI are picked up; by hand all three are given, `coordinator` as
    HOST:PORT (:PORT is loopback). A process that runs alone joins nothing. `timeout`: seconds to
    wait for the others; `silence`: seconds without a sign of life after which one counts as lost.
    Raises ConfigError, and ProcessLost where a process is missing.
    """
    if not 1 <= silence <= _DAY:
        raise ConfigError(f"the limit of silence must be 1 to {_DAY} seconds, got {silence:g}")
    given = (coordinator, process_id, num_processes)
    options: dict[str, Any] = {}
    where = detect_cluster()
    if any(value is not None for value in given):
        if coordinator is None or process_id is None or num_processes is None:
            raise ConfigError("--coordinator, --process-id and --num-processes go together")
        if not coordinator.rpartition(":")[2].isdecimal():
            raise ConfigError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
        if num_processes < 1:
            raise ConfigError(f"--num-processes must be at least 1, got {num_processes}")
        if not 0 <= process_id < num_processes:
            raise ConfigError(f"--process-id must be 0 to {num_processes - 1}, got {process_id}")
        if num_processes == 1:
            return
        bind = bind_address(coordinator)
        where = f"process 0 at {coordinator}"
        options = dict(
            coordinator_address=bind if coordinator.startswith(":") else coordinator,
            process_id=process_id,
            num_processes=num_processes,
            coordinator_bind_address=bind,
            cluster_detection_method="deactivate",
        )
    elif where is None:
        return
    elif where == "Kubernetes" and find_spec("kubernetes") is None:
        raise ConfigError(
            "this pod is one of an indexed Job: give --coordinator, --process-id and "
            "--num-processes, or let JAX ask Kubernetes (pip install 'jax[k8s]')"
        )
    mistake = (
        f"not all {num_processes or ''} processes joined within {timeout:g} s ({where}): start "
        "all of them, with the same coordinator"
    ).replace("  ", " ")
    # JAX aborts when its own limit has passed, in words that name no cause: ours comes first.
    limit = threading.Timer(timeout, _give_up, [mistake])
    limit.daemon = True
    limit.start()
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=round(timeout) + 60,
            heartbeat_timeout_seconds=round(silence),
            shutdown_timeout_seconds=round(silence),
        )
    except Exception as error:
        raise ProcessLost(f"{mistake} ({str(error).strip().splitlines()[0]})") from None
    finally:
        limit.cancel()


@contextmanager
def joined_hosts(*given: Any, timeout: float = 300.0, silence: float = SILENCE) -> Iterator[None]:
    """Work on all hosts that `join_hosts` finds; a mistake is said and ends this process at once.

    An orderly exit would wait for the others, who may wait for this one.
    """
    join_hosts(*given, timeout=timeout, silence=silence)
    try:
        yield
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        leave(cli.report(error))


def _give_up(mistake: str) -> None:
    print(f"error: {mistake}", file=sys.stderr, flush=True)
    os._exit(ProcessLost.exit_code)


def leave(code: int) -> None:
    """Ends this process at once: the others notice, where an orderly exit would wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        # A mistake that all of them have made is said by all of them, also by one that is slow.
        barrier("leave", 20.0 if code == 2 else 2.0)
        if jax.process_index() == 0:
            # All are connected through it: JAX aborts who sees it gone before ending by itself.
            time.sleep(3.0)
    except Exception:
        code = code or 1
    os._exit(code)


@contextmanager
def others_may_end() -> Iterator[None]:
    """Names the loss of another process, which shows in any computation that spans them."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if jax.process_count() == 1 or not _LOST.search(str(error)):
            raise
        first = str(error).strip().splitlines()[0]
        raise ProcessLost(f"another process of this run is gone ({first})") from error


def barrier(name: str, timeout: float = 600.0) -> None:
    """Wait for all processes, without a device. Ranks that compile may be far apart."""
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost

    key = f"fluxjax {next(_BARRIERS)} {name}"
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=round(timeout * 1000))


def gather(text: str, timeout: float = 600.0) -> list[str]:
    """Every process's `text`, in the order of processes, on every process."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    # Collectives on CPUs fail if one process arrives half a minute after another.
    barrier("gather", timeout)
    data = text.encode()
    lengths = multihost_utils.process_allgather(np.array([len(data)], np.int32))
    size = (int(lengths.max()) // BLOCK_BYTES + 1) * BLOCK_BYTES
    block = np.frombuffer(data.ljust(size, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(block)).reshape(-1, size)
    return [row.tobytes()[:n].decode() for row, n in zip(rows, lengths.ravel(), strict=True)]


def from_first(action: Callable[[], Any], timeout: float = 3600.0) -> Any:
    """What `action` returns on process 0 (anything JSON), on every process, or its mistake.

    ValueError and OSError of process 0 are raised everywhere, so that no one waits for others.
    """
    if jax.process_count() == 1:
        return action()
    answer: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": action()}
        except (ValueError, OSError) as error:
            kind = "OSError" if isinstance(error, OSError) else "ValueError"
            answer = {"error": str(error), "kind": kind}
    answer = json.loads(gather(json.dumps(answer), timeout)[0])
    if "error" in answer:
        raise (OSError if answer["kind"] == "OSError" else ValueError)(answer["error"])
    return answer["value"]


def code_fingerprint() -> str:
    """Of this package's source and the versions of JAX and Python beneath it."""
    digest = hashlib.sha256(f"{jax.__version__} {sys.version}".encode())
    root = Path(fluxjax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """What differs, in words: `steps (10 and 20)`."""
    names = sorted(one.keys() | other.keys())
    return [
        f"{name} ({one.get(name, 'none')} and {other.get(name, 'none')})"
        for name in names
        if one.get(name) != other.get(name)
    ]


def listed(differing: list[str]) -> str:
    """The first of them, and how many more there are."""
    rest = len(differing) - _NAMED
    return ", ".join(differing[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def agree(identity: Mapping[str, str]) -> None:
    """Raises ConfigError on every process if any runs another recipe, other data or other code."""
    mine = {**identity, "code": code_fingerprint()}
    first, *others = map(json.loads, gather(json.dumps(mine)))
    for index, other in enumerate(others, 1):
        if differing := differences(first, other):
            raise ConfigError(
                f"processes 0 and {index} were not started alike, they differ in "
                + listed(differing)
            )


def reached_stop(step: int) -> bool:
    """True on every process at the same step, soon after one of them was sent SIGTERM."""
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)
