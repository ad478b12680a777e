"""Training state on disk: Orbax, asynchronous, listed only once it is whole and hashed.

`folder/<step>/state` is Orbax's, `folder/<step>/state.sha256.json` its manifest. Until both are
written the folder is called `<step>.saving`, and one rename announces it. Nothing that ends in
.saving, .deleting or .old is ever read.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fluxjax.atomic_write import take_place
from fluxjax.checkpoint.component_json import write_json
from fluxjax.checkpoint.manifest import check_manifest, manifest_path, write_manifest
from fluxjax.json_input import read_json
from fluxjax.parallel import hosts

Tree = Any
SPARE_BYTES = 1 << 24
_ABSL = logging.getLogger("absl")
_IDENTITY, _STEP = "identity.json", "step of this checkpoint"


class Saved(NamedTuple):
    """A whole checkpoint."""

    step: int
    identity: dict[str, str]


class StateStore:
    """Keeps the newest `keep` whole checkpoints under `folder`.

    On several processes all of them call each method at the same step, and share the folder.
    `say` is told on process 0 what is damaged and what has been saved.
    """

    def __init__(
        self, folder: Path, keep: int = 2, *, say: Callable[[str], None] = lambda text: None
    ) -> None:
        import orbax.checkpoint as ocp

        if keep < 1:
            raise ValueError(f"keep must be 1 or more, got {keep}")
        self.folder, self.keep, self._say = Path(folder).absolute(), keep, say
        self._first = jax.process_index() == 0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._damaged: set[int] = set()
        self._newest: Saved | None = None
        self._step: int | None = None
        self.latest: int | None = None  # the step announced or restored last
        hosts.from_first(self._open)
        self._check_shared()
        # Orbax reports each phase of a save, and of a failed one every thread's traceback.
        self._log_level = _ABSL.level
        _ABSL.setLevel(logging.CRITICAL)
        self._checkpointer = ocp.AsyncCheckpointer(_handler())

    def steps(self) -> list[int]:
        """Announced checkpoints, oldest first. Whether the disk kept them, `newest` finds out."""
        return _steps(self.folder)

    def newest(self) -> Saved | None:
        """The newest checkpoint whose files are all as written. Damaged ones are named.

        None where there is no checkpoint at all; ValueError where all are damaged.
        """
        if self._newest is None:
            found = hosts.from_first(self._find)
            self._newest = found and Saved(found[0], found[1])
        return self._newest

    def restore(self, template: Tree = None) -> tuple[int, Tree] | None:
        """(step, state) of `newest()`, or None.

        `template`: arrays or ShapeDtypeStructs with shardings, which the state is read into; None
        reads numpy arrays in plain containers. Raises ValueError where shapes differ.
        """
        import orbax.checkpoint as ocp

        saved = self.newest()
        if saved is None:
            return None
        path, self.latest = self._path(saved.step) / "state", saved.step
        if template is None:
            with ocp.PyTreeCheckpointer() as reader:
                kinds = reader.metadata(path).item_metadata.tree
                args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), kinds)
                return saved.step, reader.restore(path, restore_args=args)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        try:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                return saved.step, reader.restore(path, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, TypeError) as error:
            words = " ".join(str(error).split())
            raise ValueError(f"{path} is not the state of this run: {words[:400]}") from error

    def save(self, step: int, state: Tree, identity: Mapping[str, str] | None = None) -> None:
        """Returns once the state is copied from the devices; `wait` says whether it was written.

        Raises OSError where space is short, or where the save before this one failed.
        """
        import orbax.checkpoint as ocp

        self.wait()
        self._newest, self._step = None, step
        hosts.from_first(lambda: self._prepare(step, state))
        path = self._path(step, ".saving") / "state"
        try:
            self._checkpointer.save(path, args=ocp.args.PyTreeSave(state), force=True)
        except (OSError, ValueError) as error:
            if self._first:
                _remove(path.parent)
            raise _unwritten(step, error) from error
        self._thread = threading.Thread(
            target=self._finish, args=(step, dict(identity or {})), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Until the last save is announced. Raises OSError if it could not be written."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        failed = [text for text in hosts.gather(str(error) if error else "") if text]
        if failed:
            raise error or OSError(failed[0])
        self.latest = self._step

    def __enter__(self) -> StateStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        # Where one of several processes fails, the others may be gone: wait for none of them.
        if jax.process_count() == 1 or kind is None or not issubclass(kind, Exception):
            self.close()

    def close(self) -> None:
        """Waits for what is being written, and says if that failed."""
        try:
            self.wait()
        except OSError as error:
            self._say(f"warning: {error}")
        self._checkpointer.close()
        _ABSL.setLevel(self._log_level)

    def _path(self, step: int, suffix: str = "") -> Path:
        return self.folder / f"{step:08d}{suffix}"

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir() and path.suffix in (".saving", ".deleting", ".old"):
                shutil.rmtree(path)

    def _check_shared(self) -> None:
        token = hosts.from_first(lambda: os.urandom(8).hex())
        mark = self.folder / f"{token}.shared"
        hosts.from_first(mark.touch)
        seen = hosts.gather("yes" if mark.exists() else "")
        hosts.from_first(mark.unlink)
        if "" in seen:
            raise OSError(
                f"process {seen.index('')} does not see {self.folder} of process 0: "
                "all hosts must share the folder of a run"
            )

    def _find(self) -> tuple[int, dict[str, str]] | None:
        reasons = []
        for step in reversed(self.steps()):
            try:
                return step, _check(self._path(step) / "state", step)
            except (ValueError, OSError) as error:
                self._damaged.add(step)
                reasons.append(str(error))
                self._say(f"{error}; going back to the checkpoint before")
        if reasons:
            raise ValueError(
                f"no checkpoint under {self.folder} is whole ({reasons[0]}); move the folder away "
                "to begin anew"
            )
        return None

    def require_room(self, state: Tree) -> None:
        """Raises OSError where a checkpoint of `state` would find no space."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + SPARE_BYTES
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"{self.folder} has {free / 1e9:.2f} GB free, a checkpoint needs "
                f"{needed / 1e9:.2f} GB"
            )

    def _prepare(self, step: int, state: Tree) -> None:
        try:
            self.require_room(state)
        except OSError as error:
            raise OSError(f"step {step} is not saved: {error}") from None
        shutil.rmtree(self._path(step, ".saving"), ignore_errors=True)
        self._path(step, ".saving").mkdir()

    def _finish(self, step: int, identity: dict[str, str]) -> None:
        """In its own thread: Orbax's files, then their hashes, then the name that counts."""
        try:
            self._checkpointer.wait_until_finished()
            if self._first:
                self._announce(step, identity)
        except Exception as error:
            self._error = _unwritten(step, error)
            if self._first:
                _remove(self._path(step, ".saving"))

    def _announce(self, step: int, identity: dict[str, str]) -> None:
        saving, path = self._path(step, ".saving"), self._path(step)
        write_json(saving / "state" / _IDENTITY, {**identity, _STEP: str(step)})
        write_manifest(saving / "state")
        _flush(saving / "state" / _IDENTITY, manifest_path(saving / "state"), saving)
        take_place(saving, path)  # of one that is damaged, or of a run that took the same steps
        _flush(self.folder)
        self._damaged.discard(step)
        self._say(f"saved step {step}")
        whole = [old for old in self.steps() if old not in self._damaged]
        for old in set(self.steps()) - set(whole[-self.keep :]):
            self._delete(self._path(old))

    def _delete(self, path: Path) -> None:
        """A kill in between leaves nothing that looks like a checkpoint."""
        gone = path.with_suffix(".deleting")
        path.rename(gone)
        shutil.rmtree(gone)


def read_state(folder: Path, part: str, step: int | None = None) -> tuple[int, Tree]:
    """(step, one field of the state as numpy arrays) of the newest checkpoint, or that of `step`.

    Only reads, also where a run goes on in the folder. Raises ValueError where there is no such
    checkpoint, or where it is damaged.
    """
    import orbax.checkpoint as ocp

    steps = _steps(folder) if folder.is_dir() else []
    if not steps or step not in (None, *steps):
        there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
        raise ValueError(
            f"no checkpoint{'' if step is None else f' of step {step}'} under {folder}: {there}"
        )
    step = steps[-1] if step is None else step
    path = Path(folder).absolute() / f"{step:08d}" / "state"
    _check(path, step)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        kinds = {part: reader.metadata(path).item_metadata.tree[part]}
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), kinds)
        wanted = ocp.args.PyTreeRestore(kinds, restore_args=how, partial_restore=True)
        return step, reader.restore(path, args=wanted)[part]


def _steps(folder: Path) -> list[int]:
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())


def _check(path: Path, step: int) -> dict[str, str]:
    """The identity of a checkpoint. Raises ValueError or OSError where it is not as written."""
    if not manifest_path(path).is_file():
        raise ValueError(f"{path} is damaged: its {manifest_path(path).name} is gone")
    check_manifest(path)
    identity = read_json(path / _IDENTITY)
    within = identity.pop(_STEP, str(step))
    if within != str(step):
        raise ValueError(f"{path} is damaged: it holds step {within}")
    return identity


def _handler() -> Any:
    """Orbax's writer of trees of arrays."""
    import orbax.checkpoint as ocp

    # Replicas that each write a slice help several hosts; on one they cost a program per leaf and
    # device, compiled at the first save, and memory for the slices.
    split = None if jax.process_count() > 1 else False
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=split)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _remove(folder: Path) -> None:
    """Also where Orbax goes on writing for a moment after its first error."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def _unwritten(step: int, error: Exception) -> OSError:
    words = " ".join(str(error).split())
    if reason := re.search(r"([^:]*) \[os_error_code", words):  # after the names of many layers
        words = reason[1].strip()
    return OSError(f"step {step} could not be saved: {words[:300]}")


def _flush(*paths: Path) -> None:
    """Onto the disk, so that a power cut cannot undo what was announced."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
