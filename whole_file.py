"""Files that are the old one or the new one, never half of either.

with replacing(path, "w", encoding="utf-8") as file:
    json.dump(content, file)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path, mode: str, encoding: str | None = None, sync: bool = True) -> Iterator[IO[Any]]:
    """A file beside `path` to write to; synced and renamed to `path` at the end, removed after an error.

    sync: wait until the disk has it, so that not even a power cut leaves half a file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open(mode, encoding=encoding) as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path, name: str) -> None:
    """Remove what killed runs left of `replacing` a file of this name (a glob pattern) in the folder."""
    for left_over in folder.glob(f".{name}.*.tmp"):
        left_over.unlink(missing_ok=True)
