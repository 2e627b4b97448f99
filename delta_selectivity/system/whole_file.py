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


@contextmanager
def replacing(path: Path, mode: str, encoding: str | None = None, sync: bool = True) -> Iterator[IO[Any]]:
    """A file beside `path` to write to; synced and renamed to `path` at the end, removed after an error.

    sync: wait until the disk has it, so that not even a power cut leaves half a file.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # ours alone, on whatever machine
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
    for left_over in folder.glob(f".{name}.*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - left_over.stat().st_mtime >= age:
                left_over.unlink()
