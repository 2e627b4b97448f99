"""Package versions and a source hash, recorded as provenance and used in cache keys."""

from __future__ import annotations

import functools
import hashlib
import json
import tomllib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
NAME = "delta-selectivity"


def program_version() -> str:
    """Return the version of this program; in a clone, that of the clone rather than of an installed package."""
    in_clone = PACKAGE.parent / "pyproject.toml"
    project: dict[str, Any] = tomllib.loads(in_clone.read_text("utf-8"))["project"] if in_clone.is_file() else {}
    return str(project["version"]) if project.get("name") == NAME else version(NAME)


@functools.cache  # read once: the loaded version stays in use if another one is installed later
def installed_version(package: str) -> str | None:
    """Return the version of a package by its name on PyPI; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache  # read once: files may change during a long run, loaded code does not
def running_program(sources: tuple[str, ...]) -> str:
    """Return the digest of these source files (glob patterns) at the first call in this process."""
    return program_digest(PACKAGE, sources)


def program_digest(root: Path, sources: Sequence[str]) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of the text of the files below `root`.

    Raises FileNotFoundError for a pattern without a match, because changes of a renamed file would go unnoticed.
    """
    files = {source: list(root.glob(source)) for source in sources}
    if missing := [source for source, paths in files.items() if not paths]:
        raise FileNotFoundError(f"no source file matches {missing[0]}")
    found = hashlib.sha256()
    for path in sorted({path for paths in files.values() for path in paths}):
        found.update(json.dumps([path.relative_to(root).as_posix(), path.read_text("utf-8")]).encode())
    return found.hexdigest()
