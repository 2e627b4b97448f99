"""Package versions and a source hash, recorded as provenance and used in cache keys."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HOME = Path(__file__).parents[1]


@functools.cache  # what was loaded is what runs, whatever is installed later: one look at the disk
def installed_version(package: str) -> str | None:
    """The version of a package, by its name on PyPI; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache  # once a process: the text may change below a long run, what was loaded does not
def running_program(sources: tuple[str, ...]) -> str:
    """The digest of these files (patterns) of the program as they were when this process first asked."""
    return program_digest(HOME, sources)


def program_digest(root: Path, sources: Sequence[str]) -> str:
    """SHA-256 (64 hexadecimal digits) of the text of the files below `root`.

    Raises FileNotFoundError for a pattern that matches no file: what it stood for would change unnoticed.
    """
    files = {source: list(root.glob(source)) for source in sources}
    if nothing := [source for source, paths in files.items() if not paths]:
        raise FileNotFoundError(f"no file of the program is called {nothing[0]}")
    found = hashlib.sha256()
    for path in sorted({path for paths in files.values() for path in paths}):
        found.update(json.dumps([path.relative_to(root).as_posix(), path.read_text("utf-8")]).encode())
    return found.hexdigest()
