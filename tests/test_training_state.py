"""Checkpoints of a training run: whole or not there, and what happens to them on a bad disk."""

import logging
import random
import shutil
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fluxjax.checkpoint.manifest import check_manifest, manifest_path
from fluxjax.checkpoint.training_state import Saved, StateStore, read_state
from fluxjax.train.step import init_state

IDENTITY = {"recipe": "abc", "data": "def"}


def state_of(value: float):
    params = {
        "b": {"kernel": jnp.full((3, 4), value), "bias": jnp.arange(4.0)},
        "a": {"kernel": jnp.full((4, 4), value, jnp.bfloat16)},
    }
    return init_state(params, optax.adamw(1e-3), ema=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints, of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("whole")
    with StateStore(folder) as store:
        for step in (1, 2):
            store.save(step, state_of(step), IDENTITY)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def newest(folder: Path) -> tuple[Saved | None, list[str]]:
    said: list[str] = []
    with StateStore(folder, say=said.append) as store:
        return store.newest(), said


def test_a_state_comes_back_as_it_was_and_the_newest_are_kept(tmp_path):
    said: list[str] = []
    with StateStore(tmp_path, keep=2, say=said.append) as store:
        assert store.newest() is None and store.restore() is None
        for step in range(3):
            store.save(step, state_of(step), IDENTITY)
        store.wait()
        assert store.steps() == [1, 2] and store.latest == 2
        assert said == [f"saved step {step}" for step in range(3)]
    with StateStore(tmp_path) as store:
        assert store.newest() == Saved(2, IDENTITY)
        restored = store.restore(jax.eval_shape(lambda: state_of(0.0)))
        raw = store.restore()
    assert restored is not None and raw is not None
    expected = state_of(2.0)
    assert restored[0] == 2
    assert jax.tree.structure(restored[1]) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (restored[1], expected)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert isinstance(raw[1]["params"]["a"]["kernel"], np.ndarray)
    np.testing.assert_array_equal(raw[1]["params"]["b"]["bias"], np.arange(4.0))


class Witness:
    """Looks, before every change to files that Python makes, at what a kill there would leave."""

    CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.looks = 0
        self.wrong: list[str] = []
        self._lock = threading.RLock()
        sys.addaudithook(self)  # for the life of the process: without a folder it does nothing

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.folder is None or event not in self.CHANGES:
            return
        if event == "open" and not (
            isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
        ):
            return
        with self._lock:
            folder, self.folder = self.folder, None  # looking opens files too
            for path in (path for path in folder.iterdir() if path.name.isdecimal()):
                self.looks += 1
                try:
                    check_manifest(path / "state")
                    whole = manifest_path(path / "state").is_file()
                except (ValueError, OSError):
                    whole = False
                if not whole:
                    self.wrong.append(f"{path.name} is not whole before {event} {arguments[0]}")
            self.folder = folder


def test_whatever_is_listed_is_whole_at_every_change_of_a_file(tmp_path):
    witness = Witness()
    with StateStore(tmp_path, keep=1) as store:
        witness.folder = tmp_path
        for step in (1, 2, 2):  # step 2 again: as of a run that took the same steps before
            store.save(step, state_of(step), IDENTITY)
            store.wait()
        witness.folder = None
        assert store.steps() == [2]
    assert not witness.wrong, witness.wrong[0]
    assert witness.looks > 20, witness.looks


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("damage", [_flip, _cut, Path.unlink])
def test_damage_to_any_file_is_found_and_the_step_before_is_used(folder, damage):
    random.seed(0)
    files = sorted(p for p in (folder / "00000002").rglob("*") if p.is_file())
    files = [path for path in files if path.stat().st_size]  # Orbax leaves one empty mark
    assert len(files) > 10
    for path in files:
        before = path.read_bytes()
        damage(path)
        found, said = newest(folder)
        assert found == Saved(1, IDENTITY), path
        assert len(said) == 1 and "00000002" in said[0] and "going back" in said[0]
        path.write_bytes(before)
    assert newest(folder) == (Saved(2, IDENTITY), [])


def test_a_checkpoint_that_is_called_another_step_is_not_used(folder):
    (folder / "00000002").rename(folder / "00000007")
    found, said = newest(folder)
    assert found == Saved(1, IDENTITY)
    assert "it holds step 2" in said[0] and "going back" in said[0]


def test_one_part_of_any_checkpoint_can_be_read_while_a_run_goes_on(folder):
    (folder / "00000003.saving").mkdir()  # the run's
    before = sorted(folder.rglob("*"))
    for step, value in ((None, 2.0), (1, 1.0)):
        found, params = read_state(folder, "params", step)
        assert found == int(value)
        np.testing.assert_array_equal(params["b"]["kernel"], np.full((3, 4), value))
        assert isinstance(params["a"]["kernel"], np.ndarray) and params["a"]["kernel"].dtype == (
            jnp.bfloat16
        )
    with pytest.raises(ValueError, match=r"no checkpoint of step 5 under .*: there are 1, 2"):
        read_state(folder, "params", 5)
    with pytest.raises(ValueError, match="there is none"):
        read_state(folder / "none", "params")
    assert sorted(folder.rglob("*")) == before
    _flip(next((folder / "00000002" / "state").rglob("_METADATA")))
    with pytest.raises(ValueError, match="00000002/state is damaged"):
        read_state(folder, "params")


def test_logging_is_as_before_once_a_store_is_closed(tmp_path):
    logger = logging.getLogger("absl")
    before = logger.level
    with StateStore(tmp_path):
        assert logger.level == logging.CRITICAL
    assert logger.level == before


def test_a_file_too_many_is_damage_and_the_next_save_replaces_the_damaged(folder):
    (folder / "00000002" / "state" / "more").touch()
    with StateStore(folder, keep=2) as store:
        assert store.newest() == Saved(1, IDENTITY)
        store.save(2, state_of(5.0), IDENTITY)
    with StateStore(folder) as store:
        assert store.newest() == Saved(2, IDENTITY)
        raw = store.restore()
    assert raw is not None and raw[1]["params"]["b"]["kernel"][0, 0] == 5.0


def test_where_all_are_damaged_nothing_begins_anew_unasked(folder):
    for path in folder.rglob("_METADATA"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no checkpoint under .* is whole .*_METADATA"):
        newest(folder)


def test_what_a_kill_left_is_no_checkpoint(folder):
    """Orbax's own folder that is not finished; one that is finished but not announced; ..."""
    (folder / "00000003.saving" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    shutil.copytree(folder / "00000002", folder / "00000004.saving")
    shutil.copytree(folder / "00000002", folder / "00000000.deleting")
    with StateStore(folder) as store:
        assert store.steps() == [1, 2]
    assert sorted(path.name for path in folder.iterdir()) == ["00000001", "00000002"]


def test_no_room_is_said_before_anything_is_written(folder):
    enormous = {"w": np.broadcast_to(np.float32(0), (2**50,))}
    with StateStore(folder) as store:
        with pytest.raises(OSError, match=r"step 3 is not saved: .* GB free, .* needs 45"):
            store.save(3, enormous, IDENTITY)
        assert store.newest() == Saved(2, IDENTITY)
    assert sorted(path.name for path in folder.iterdir()) == ["00000001", "00000002"]


def test_another_state_is_refused_in_a_sentence(folder):
    other = state_of(0.0)._replace(params={"b": {"kernel": jnp.zeros((3, 4))}})
    with StateStore(folder) as store, pytest.raises(ValueError, match="is not the state of this"):
        store.restore(other)
