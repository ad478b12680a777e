"""What is there after a kill at any moment is whole: the old or the new, and no leftovers."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fluxjax import atomic_write
from fluxjax.atomic_write import (
    remove_leftovers,
    take_place,
    whole_or_nothing,
    write_bytes,
    write_new,
)
from fluxjax.lock import InUse

REPLACES_FOLDERS = """
import sys
from pathlib import Path
from fluxjax.atomic_write import whole_or_nothing
for number in range(10**9):
    with whole_or_nothing(Path(sys.argv[1])) as part:
        part.mkdir()
        for name in "ab":
            (part / name).write_text(str(number))
    print("written", flush=True)
"""
WRITES_PICTURES = """
import sys
from pathlib import Path
from fluxjax.atomic_write import write_new
for _ in range(2000):
    write_new(Path(sys.argv[1]), b"whole" * 10000)
    print("written", flush=True)
"""


@contextmanager
def killed_after(program: str, path: Path, seconds: float) -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"written\n"
        time.sleep(seconds)
        writer.send_signal(signal.SIGKILL)
    yield


def test_a_killed_writer_of_folders_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """In the same process number or another: the next writer takes over what is left."""
    folder, chance = tmp_path / "model", random.Random(0)
    for _ in range(12):
        with killed_after(REPLACES_FOLDERS, folder, chance.uniform(0.005, 0.05)):
            first, second = ((folder / name).read_text() for name in "ab")
            assert first == second
    with whole_or_nothing(folder) as part:
        part.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_killed_writer_of_pictures_leaves_whole_ones(tmp_path: Path) -> None:
    chance = random.Random(1)
    for _ in range(6):
        with killed_after(WRITES_PICTURES, tmp_path / "a.png", chance.uniform(0.005, 0.03)):
            assert {path.stat().st_size for path in tmp_path.glob("a*.png")} == {50000}


def test_without_exchange_a_kill_in_between_is_healed(tmp_path: Path, monkeypatch) -> None:
    """File systems that know no exchange: what was there comes back when the next one starts."""
    monkeypatch.setattr(atomic_write, "_renameat2", lambda *_: False)
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old" / "weights").touch()
    (tmp_path / ".model.part").mkdir()
    with pytest.raises(KeyboardInterrupt), whole_or_nothing(tmp_path / "model"):
        raise KeyboardInterrupt
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == [
        "model",
        "model/weights",
    ]
    with whole_or_nothing(tmp_path / "model") as part:
        part.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["model"]


def test_what_is_written_beside_under_a_longer_name_stays(tmp_path: Path) -> None:
    """`model` and `model.safetensors`, or `flux` and `flux.1`, each with a writer of its own."""
    for name in ("model.safetensors", "model.1"):
        (tmp_path / f".{name}.old").write_text("theirs")
        with whole_or_nothing(tmp_path / "model") as part:
            part.write_text("ours")
        assert (tmp_path / f".{name}.old").read_text() == "theirs"
        with whole_or_nothing(tmp_path / name) as other:
            other.write_text("theirs")
            with whole_or_nothing(tmp_path / "model") as part:
                part.write_text("ours")
        assert (tmp_path / name).read_text() == "theirs"
        assert (tmp_path / "model").read_text() == "ours"
        (tmp_path / "model").unlink()


@pytest.mark.parametrize("exchange", [True, False])
def test_kinds_may_differ_and_links_are_followed(tmp_path: Path, monkeypatch, exchange) -> None:
    if not exchange:
        monkeypatch.setattr(atomic_write, "_renameat2", lambda *_: False)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    with whole_or_nothing(tmp_path / "link") as part:
        part.write_text("a file now")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == "a file now"
    with whole_or_nothing(tmp_path / "there") as part:
        part.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]


@pytest.mark.skipif(sys.platform != "linux", reason="others have no exchange")
def test_a_folder_takes_anothers_place_in_one_step(tmp_path: Path, monkeypatch) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    monkeypatch.delattr(os, "rename")
    take_place(tmp_path / "new", tmp_path / "old")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["old", "old/new"]


def test_a_new_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch) -> None:
    synced, fsync = [], os.fsync

    def noted(file):
        synced.append((os.fstat(file).st_size, (tmp_path / "a.png").exists()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    write_new(tmp_path / "a.png", b"abc")
    assert (3, False) in synced


def test_two_writers_and_what_appears_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with pytest.raises(FileExistsError, match="appeared"), whole_or_nothing(path) as part:
        with pytest.raises(InUse), whole_or_nothing(path):
            pass
        part.write_text("ours")
        path.write_text("another program's")
    assert path.read_text() == "another program's"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("missing", [(), ("link",), ("link", "_renameat2")])
def test_a_new_file_takes_the_first_free_name(tmp_path: Path, monkeypatch, missing) -> None:
    if "link" in missing:

        def no_link(*_):
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", no_link)
    if "_renameat2" in missing:
        monkeypatch.setattr(atomic_write, "_renameat2", lambda *_: False)
    names = [write_new(tmp_path / "a.png", bytes([i])).name for i in range(3)]
    assert names == ["a.png", "a-2.png", "a-3.png"]
    assert [(tmp_path / name).read_bytes() for name in names] == [b"\0", b"\1", b"\2"]
    assert len(list(tmp_path.iterdir())) == 3
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o666 & ~mask


def test_many_write_the_same_small_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "entry"
    contents = [bytes([i]) * 100000 for i in range(8)]
    threads = [threading.Thread(target=write_bytes, args=(path, c)) for c in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents and len(list(path.parent.iterdir())) == 1


def test_leftovers_go_when_their_writer_is_gone(tmp_path: Path, monkeypatch) -> None:
    left = tmp_path / "latents" / ".entry.0123abcd.part"
    left.parent.mkdir()
    left.write_text("half")
    remove_leftovers(tmp_path)
    assert left.exists()  # its writer may just have made it
    os.utime(left, (0, 0))
    write = os.replace

    def replace(part, path):
        os.utime(part, (0, 0))
        remove_leftovers(tmp_path)  # ours is locked
        write(part, path)

    monkeypatch.setattr(os, "replace", replace)
    write_bytes(left.parent / "entry", b"whole")
    assert [path.name for path in left.parent.iterdir()] == ["entry"]


def test_a_file_never_takes_the_place_of_what_is_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "work").write_text("of a year")
    with pytest.raises(FileExistsError, match="is a folder"), whole_or_nothing(folder) as part:
        part.write_text("new")
    assert (folder / "work").read_text() == "of a year" and [*tmp_path.iterdir()] == [folder]


def test_errors_name_what_was_asked_for(tmp_path: Path) -> None:
    """Of files within a folder too, whose hidden name nobody has typed."""
    asked = tmp_path / "model"
    for inner in ("", "transformer/x.safetensors"):
        with pytest.raises(OSError) as error, whole_or_nothing(asked) as part:
            raise OSError(errno.ENOSPC, "No space left on device", str(part / inner))
        assert error.value.filename == str(asked / inner)
    other = tmp_path / "other"
    with pytest.raises(OSError) as error, whole_or_nothing(asked):
        raise OSError(errno.EIO, "Input/output error", str(other))
    assert error.value.filename == str(other)
