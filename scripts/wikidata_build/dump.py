"""Read a dump: one JSON array of any size with an entity on each line.

Most of its hundred million lines are neither human nor class. They are skipped before they are parsed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from delta_selectivity.errors import RequestError
from scripts.wikidata_build.compression import READ_ERRORS, SUFFIXES, unpacked

LONGEST_LINE = 64 * 2**20  # bytes; the longest lines in real dumps have about 5 MB
STDIN = "-"


@dataclass
class Tally:
    """Numbers of lines that were read."""

    lines: int = 0
    malformed: int = 0
    ends_early: bool = False  # the file is truncated, such as an interrupted download; the lines before are used


def check_dump(path: str) -> None:
    """Check that there is a file at `path` that can be read. Raises `RequestError` if not."""
    if path == STDIN:
        return
    if not Path(path).is_file():
        raise RequestError(f"{path}: no such file: give Wikidata's JSON dump, e.g. latest-all.json.bz2")
    if Path(path).suffix not in (".json", *SUFFIXES):
        raise RequestError(f"{path}: unknown suffix: give .json, {', '.join(SUFFIXES)}, or - for JSON on stdin")


def entities(path: str, tally: Tally, advance: Callable[[int], object]) -> Iterator[dict[str, Any]]:
    """Yield entities that may be human or class; `-` reads JSON from stdin (`lbzip2 -dc dump.json.bz2 | ...`).

    advance: called with the number of bytes of the file that were read since the last call. Lines that are no JSON
    object are counted and skipped. Raises `RequestError` if the file is not compressed as its suffix says.
    """
    with _opened(path) as (stream, position):
        seen = 0
        for line in _lines(path, stream, tally):
            tally.lines += 1
            if tally.lines % 1024 == 0:
                seen, before = position(), seen
                advance(seen - before)
            if not (line.startswith(b"{") and line.endswith(b"}")):
                tally.malformed += 1
            elif b'"Q5"' in line or b'"P279"' in line:
                entity = _parsed(line)
                if entity is None:
                    tally.malformed += 1
                else:
                    yield entity
        advance(position() - seen)


@contextmanager
def _opened(path: str) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """Return the bytes, and a function that returns how many bytes of the file were read."""
    if path == STDIN:
        yield sys.stdin.buffer, lambda: 0
        return
    with Path(path).open("rb") as raw, unpacked(raw, Path(path).suffix) as stream:
        yield stream, raw.tell


def _lines(path: str, stream: IO[bytes], tally: Tally) -> Iterator[bytes]:
    """Yield lines without the array's brackets and commas; of a line without end, only the first part."""
    try:
        while line := stream.readline(LONGEST_LINE):
            whole = len(line) < LONGEST_LINE or line.endswith(b"\n")
            bare = line.strip().removesuffix(b",")
            if bare not in (b"", b"[", b"]"):
                yield bare
            while not whole:
                rest = stream.readline(LONGEST_LINE)
                whole = len(rest) < LONGEST_LINE or rest.endswith(b"\n")
    except EOFError:
        tally.ends_early = True
    except READ_ERRORS as error:
        raise RequestError(f"{path}: cannot be read after {tally.lines} lines ({error})") from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entity = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entity if isinstance(entity, dict) else None
