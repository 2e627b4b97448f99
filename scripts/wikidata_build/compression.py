"""Files as they are or compressed, told by their suffix."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any

import zstandard

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)  # EOFError: cut short

_READERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda raw: io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)),
}
SUFFIXES = tuple(_READERS)


def unpacked(raw: IO[bytes], suffix: str) -> IO[bytes]:
    """The bytes of an open file, packed as its suffix says: not at all if it is none of `SUFFIXES`."""
    reader = _READERS.get(suffix)
    stream: IO[bytes] = reader(raw) if reader else raw
    return stream
