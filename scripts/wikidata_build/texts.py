"""Read a folder of texts: `.txt` and `.jsonl` (with a field `text`), plain or compressed (.gz, .xz, .zst, .bz2)."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from delta_selectivity.errors import RequestError
from scripts.wikidata_build.compression import READ_ERRORS, SUFFIXES, unpacked

PIECE = 2**20  # maximum characters of a text; longer .txt files are split
KINDS = (".txt", ".jsonl")


@dataclass
class TextTally:
    """Numbers of texts that were read."""

    texts: int = 0
    characters: int = 0
    malformed: int = 0  # lines of .jsonl that are not an object with a text


def text_files(folder: Path) -> list[Path]:
    """Return all files of the supported kinds, in order of path. Raises `RequestError` if there are none."""
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder: give one with {' or '.join(KINDS)} files")
    files = [path for path in sorted(folder.rglob("*")) if _kind(path) in KINDS and path.is_file()]
    if not files:
        raise RequestError(f"{folder}: there is no {' or '.join(KINDS)} file, plain or as {', '.join(SUFFIXES)}")
    return files


def texts(files: list[Path], tally: TextTally, advance: Callable[[int], object]) -> Iterator[str]:
    """Yield every text of every file. advance: called with the number of bytes that were read since the last call.

    Raises `RequestError` if a file is not compressed as its suffix says, or is truncated.
    """
    for path in files:
        with path.open("rb") as raw:
            seen = 0
            try:
                for text in _texts_of(path, raw, tally):
                    tally.texts += 1
                    tally.characters += len(text)
                    yield text
                    seen, before = raw.tell(), seen
                    advance(seen - before)
            except READ_ERRORS as error:
                raise RequestError(f"{path}: cannot be read ({error})") from error


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in SUFFIXES else path.suffix


def _texts_of(path: Path, raw: IO[bytes], tally: TextTally) -> Iterator[str]:
    stream = io.TextIOWrapper(unpacked(raw, path.suffix), encoding="utf-8-sig", errors="replace", newline="")
    if _kind(path) == ".txt":
        while piece := stream.read(PIECE):
            yield piece + stream.readline(PIECE)  # continue to the end of the line, so that no name is split
        return
    for line in stream:
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError, RecursionError):
            text = None
        if isinstance(text, str):
            yield text
        else:
            tally.malformed += 1
