"""Exclusive locks on files.

The kernel lets go when its holder ends, by whatever end, so no lock is ever stale. The lock file holds nothing and
is removed by its holder; one that a killed run left behind is no obstacle.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # some network file systems


class Locked(Exception):
    """Another process, or another run in this one, holds the lock."""


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock of `path` (which need not exist). Raises `Locked` at once if somebody else does."""
    beside = path.with_name(f".{path.name}.lock")
    descriptor = _acquire(beside)
    try:
        yield
    finally:
        with suppress(OSError):  # a folder that became read-only keeps it: no obstacle, and not the error to tell
            beside.unlink()  # while it is held: `_acquire` of others sees that it is no longer the file
        os.close(descriptor)


def _acquire(beside: Path) -> int:
    """The locked descriptor of the lock file."""
    while True:
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(descriptor)
            if _is_still(descriptor, beside):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise Locked(str(beside)) from error
        except OSError as error:
            if error.errno in _NO_LOCKS_HERE:
                log.warning("%s: this file system has no locks: do not run the same twice at a time", beside.parent)
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it between our opening and our locking


def _lock(descriptor: int) -> None:
    """Lock the file, or raise BlockingIOError if another has it."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt

    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        raise BlockingIOError(errno.EAGAIN, "locked") from error


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
