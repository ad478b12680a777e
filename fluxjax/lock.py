"""A lock on a file or folder that is being written. It dies with the process that holds it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock: nothing is locked there
    fcntl = None

# Disks without locks (some network mounts): the work is done all the same, unlocked.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class InUse(OSError):
    """Another process, or another thread, holds the lock; says who and what to do."""


def lock_beside(destination: Path) -> Path:
    """The lock of what is replaced as a whole: a hidden file beside it."""
    return destination.with_name(f".{destination.name}.lock")


@contextmanager
def locked(lock_file: Path, what: str) -> Iterator[None]:
    """Hold the lock that `lock_file` stands for; its folder must exist.

    A file that a killed process left is taken over. Ours is removed at the end.
    Raises InUse, naming `what` (as in "RUN is in use by process 12 on HOST ..."), at once if the
    lock is held; OSError if the file cannot be made.
    """
    descriptor = _take(Path(lock_file))
    if descriptor is None:
        raise InUse(
            f"{what} is in use by {_holder(lock_file)}, which writes to it: wait until it has "
            "ended, or write to another place"
        )
    try:
        yield
    finally:
        # Removed before it is released, so that nobody can hold a file without a name for long.
        with suppress(OSError):
            os.unlink(lock_file)
        os.close(descriptor)


def _take(path: Path) -> int | None:
    """The descriptor that holds the lock, or None where another one does."""
    while True:
        # Opened for writing, because network disks lock nothing else.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not try_lock(descriptor):
                os.close(descriptor)
                return None
            held, named = os.fstat(descriptor), _stat(path)
            if named is not None and (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino):
                with suppress(OSError):  # a full disk: only the name of the holder is lost
                    os.truncate(descriptor, 0)
                    os.write(
                        descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode()
                    )
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed the file in between: try the new one


def try_lock(descriptor: int) -> bool:
    """Whether the open file is now locked by us. Raises OSError if it cannot be asked."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _holder(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")[:200]
    except OSError:
        text = ""
    return text if text.startswith("process ") and text.isprintable() else "another process"
