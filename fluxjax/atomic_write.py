"""Files and folders that appear whole or not at all, also when their writer is killed.

`whole_or_nothing`: a model, a sheet, anything that one process writes. `write_bytes`: small files
that several may write at once, the last one wins. `write_new`: a file beside those that are there.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from fluxjax.lock import lock_beside, locked, try_lock

_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2
# What a file system answers that knows no hard links, or no such rename.
_UNKNOWN = (
    errno.ENOSYS,
    errno.EINVAL,
    errno.EPERM,
    errno.EOPNOTSUPP,
    errno.EMLINK,
    errno.ENOTTY,
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of which Python says no file
_ENDINGS = 9999
# A writer locks its file within this time after making it.
_LOCKED_AFTER = 10.0


@contextmanager
def whole_or_nothing(destination: Path) -> Iterator[Path]:
    """A path beside the destination to write a file or folder to, which then takes its place.

    On any error, Ctrl-C included, it is removed and what was there before stays. What was there is
    exchanged in one step, so that a kill leaves the old or the new; what a killed writer left
    beside it is removed by the next. A symbolic link is followed.

    Raises lock.InUse while another one writes there; FileExistsError if something has appeared
    there in the meantime, or where a file would take the place of a folder that is not empty;
    OSError.
    """
    destination = Path(os.path.realpath(destination))
    destination.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock_beside(destination), str(destination)):
        _heal(destination)
        part = destination.with_name(f".{destination.name}.part")
        replaces = os.path.lexists(destination)
        try:
            with said_of(destination, part):
                yield part
            if replaces:
                _require_no_loss(part, destination)
                take_place(part, destination)
            elif not _rename_new(part, destination):
                raise FileExistsError(errno.EEXIST, "appeared while it was written", destination)
        finally:
            _remove(part)


def _require_no_loss(part: Path, destination: Path) -> None:
    """A file never takes the place of a folder with all that is in it."""
    if not part.is_dir() and destination.is_dir() and any(destination.iterdir()):
        why = "it is a folder, whose place no file takes"
        raise FileExistsError(errno.EEXIST, why, str(destination))


@contextmanager
def said_of(path: Path, part: Path) -> Iterator[None]:
    """Of what is written as `part`, or in it, an OSError, that of a full disk too, names `path`."""
    try:
        yield
    except OSError as error:
        name = error.filename
        if name is None and error.errno in _FULL:
            name = part
        if name is not None and error.filename2 is None and Path(name).is_relative_to(part):
            said = path / Path(name).relative_to(part)
            raise OSError(error.errno, error.strerror, str(said)) from error
        raise


def _heal(destination: Path) -> None:
    """Only to be called by the holder of the lock: whoever left these is gone."""
    old, part = (destination.with_name(f".{destination.name}.{end}") for end in ("old", "part"))
    if os.path.lexists(old) and not os.path.lexists(destination):
        os.rename(old, destination)
    for path in (old, part):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def take_place(part: Path, destination: Path) -> None:
    """Give what was written as `part` its name; what has that name goes.

    In one step where the system can; else a kill in between is healed at the next writing by
    `whole_or_nothing`. Raises OSError.
    """
    if (part.is_file() and destination.is_file()) or not os.path.lexists(destination):
        os.replace(part, destination)
        return
    if _renameat2(part, destination, _RENAME_EXCHANGE):
        _remove(part)
        return
    old = destination.with_name(f".{destination.name}.old")
    os.rename(destination, old)
    try:
        os.rename(part, destination)
    except OSError:
        os.rename(old, destination)
        raise
    _remove(old)


def _rename_new(part: Path, target: Path) -> bool:
    """Give the file or folder its name unless that is taken."""
    try:
        if _renameat2(part, target, _RENAME_NOREPLACE):
            return True
    except FileExistsError:
        return False
    if os.path.lexists(target):  # a gap, on file systems that know nothing better
        return False
    os.rename(part, target)
    return True


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Linux' rename with flags; False where there is none. Raises OSError."""
    import ctypes

    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    rename = getattr(library, "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def write_bytes(path: Path, content: bytes) -> None:
    """A small file, in place of what was there. Several processes and threads may write at once.

    What killed writers leave is for `remove_leftovers`. Raises OSError.
    """
    with locked_part(path) as (part, file):
        file.write(content)
        file.flush()
        os.replace(part, path)


def write_new(path: Path, content: bytes) -> Path:
    """The first free one of name.png, name-2.png, name-3.png ...; returns which.

    Nothing that is there is touched, and the name appears with the content, never empty.
    Raises OSError.
    """
    with locked_part(path) as (part, file):
        file.write(content)
        to_disk(file)
        for target in _numbered(path):
            if _link_new(part, target):
                return target
    raise OSError(f"{path.parent} is full of files named {path.stem}")


def place_new(part: Path, path: Path) -> Path:
    """Give what was written as `part` the first free one of name.mp4, name-2.mp4, name-3.mp4 ...;
    returns which. Raises OSError.
    """
    for target in _numbered(path):
        if _rename_new(part, target):
            return target
    raise OSError(f"{path.parent} is full of files named {path.stem}")


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in range(2, _ENDINGS):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def _link_new(part: Path, target: Path) -> bool:
    try:
        os.link(part, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        return _rename_new(part, target)
    return True


def to_disk(file: IO) -> None:
    """What was written to it, so that not after a power cut either its name is there without."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def locked_part(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new empty file under a hidden name beside `path`, locked as long as we live, then gone.

    An OSError names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with said_of(path, part), open(part, "xb") as file:
        try:
            try_lock(file.fileno())
            yield part, file
        finally:
            part.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: str = "**/.*") -> None:
    """Remove what killed writers left as a `locked_part`, under `names` up to its random end."""
    for part in Path(folder).glob(f"{names}.{'[0-9a-f]' * 8}.part"):
        with suppress(OSError), open(part, "r+b") as file:
            age = time.time() - os.fstat(file.fileno()).st_mtime
            if age > _LOCKED_AFTER and try_lock(file.fileno()):
                part.unlink()
