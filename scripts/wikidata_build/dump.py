"""The dump: one JSON array with an entity on each line, of any size, read a line at a time.

Most of its hundred million lines are neither human nor class. They are told apart before they are parsed.
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

LONGEST_LINE = 64 * 2**20  # bytes; the longest in real dumps have some 5 MB
STDIN = "-"


@dataclass
class Tally:
    """What went by."""

    lines: int = 0
    malformed: int = 0
    ends_early: bool = False  # a download that broke off; what came is of use


def check_dump(path: str) -> None:
    """Raises `RequestError` if there is nothing at `path`, or nothing that we could read."""
    if path == STDIN:
        return
    if not Path(path).is_file():
        raise RequestError(f"{path}: no such file: give Wikidata's JSON dump, e.g. latest-all.json.bz2")
    if Path(path).suffix not in (".json", *SUFFIXES):
        raise RequestError(f"{path}: unknown suffix: give .json, {', '.join(SUFFIXES)}, or - for JSON on stdin")


def entities(path: str, tally: Tally, advance: Callable[[int], object]) -> Iterator[dict[str, Any]]:
    """Entities that may be human or class; `-` reads JSON from stdin (`lbzip2 -dc dump.json.bz2 | ...`).

    advance: told the bytes of the file, as it has them, that have gone by since the last call.
    Lines that are no JSON object are counted and passed over. Raises `RequestError` if the file is not compressed as
    its suffix says.
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
    """The bytes, and how many of the file have gone by."""
    if path == STDIN:
        yield sys.stdin.buffer, lambda: 0
        return
    with Path(path).open("rb") as raw, unpacked(raw, Path(path).suffix) as stream:
        yield stream, raw.tell


def _lines(path: str, stream: IO[bytes], tally: Tally) -> Iterator[bytes]:
    """Lines without the array's brackets and commas; of one that never ends the first part."""
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
