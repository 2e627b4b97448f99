"""Exclusive file locks.

The kernel releases a lock when its process ends for any reason, so no lock is ever stale. The lock file is empty and
removed by its owner; one that remains after a killed run does not block.
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

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # errors of file systems without locks


class Locked(Exception):
    """The lock is held by another process, or by another run in this one."""


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock of `path`, which need not exist. Raises `Locked` at once if it is held elsewhere."""
    lock_path = path.with_name(f".{path.name}.lock")
    descriptor = _acquire(lock_path)
    try:
        yield
    finally:
        with suppress(OSError):  # in a read-only folder it stays, which is harmless
            lock_path.unlink()  # while locked, so that a waiting `_acquire` detects the removal
        os.close(descriptor)


def _acquire(lock_path: Path) -> int:
    """Open and lock the lock file; return its descriptor."""
    while True:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(descriptor)
            if _is_still(descriptor, lock_path):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise Locked(str(lock_path)) from error
        except OSError as error:
            if error.errno in _NO_LOCKS:
                log.warning(
                    "%s: this file system does not support locks: do not start the same run twice", lock_path.parent
                )
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner removed it between our open and our lock


def _lock(descriptor: int) -> None:
    """Lock the file. Raises BlockingIOError if it is locked elsewhere."""
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
