"""Atomic file writes.

with replacing(path, "w", encoding="utf-8") as file:
    json.dump(content, file)
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from delta_selectivity.errors import RequestError

_TOKEN = 4  # random bytes in a temporary file's name


def temporary_name(path: Path) -> Path:
    """Return a unique hidden name next to `path`, safe on shared file systems."""
    return path.with_name(f".{path.name}.{secrets.token_hex(_TOKEN)}.tmp")


@contextmanager
def replacing(path: Path, mode: str, encoding: str | None = None, sync: bool = True) -> Iterator[IO[Any]]:
    """Open a temporary file next to `path`, which replaces `path` at the end, or is removed after an error.

    sync: flush to disk first, so that a power failure cannot leave a partial file.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open(mode, encoding=encoding) as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path, name: str, age: float = 0.0) -> None:
    """Remove temporary files that killed runs left in the folder, for files of this name (a glob pattern).

    age: minimum seconds since the last write, where other processes may be writing.
    """
    for path in folder.glob(f".{name}.{'[0-9a-f]' * 2 * _TOKEN}.tmp"):  # exactly the names that `replacing` uses
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= age:
                path.unlink()


def refuse_link(folder: Path) -> None:
    """Raise `RequestError` if a folder that this program creates is a symbolic link, to protect the link's target."""
    if folder.is_symlink():
        raise RequestError(
            f"{folder} is a symbolic link, whose target's files would be replaced or removed: remove the link"
        )
