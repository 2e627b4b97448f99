"""Atomic writes: a file is replaced as a whole.

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

_TOKEN = 4  # bytes, which name a temporary file


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that nobody else uses, on whatever machine."""
    return path.with_name(f".{path.name}.{secrets.token_hex(_TOKEN)}.tmp")


@contextmanager
def replacing(path: Path, mode: str, encoding: str | None = None, sync: bool = True) -> Iterator[IO[Any]]:
    """A file beside `path` to write to; synced and renamed to `path` at the end, removed after an error.

    sync: wait until the disk has it, so that not even a power cut leaves half a file.
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
    """Remove what killed runs left of `replacing` a file of this name (a glob pattern) in the folder.

    age: seconds for which nobody has written to it; where others may be writing now.
    """
    for left_over in folder.glob(f".{name}.{'[0-9a-f]' * 2 * _TOKEN}.tmp"):  # as `replacing` names them, and no other
        with suppress(FileNotFoundError):
            if time.time() - left_over.stat().st_mtime >= age:
                left_over.unlink()


def refuse_link(folder: Path) -> None:
    """Raises `RequestError` if a folder that this program makes is a symbolic link: what is behind it is not ours."""
    if folder.is_symlink():
        raise RequestError(
            f"{folder} is a symbolic link: files behind it would be replaced and removed; remove the link"
        )
