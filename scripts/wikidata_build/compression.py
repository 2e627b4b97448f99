"""Open files that may be compressed, as their suffix says."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any

import zstandard

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)  # EOFError: truncated

_READERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda raw: io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)),
}
SUFFIXES = tuple(_READERS)


def unpacked(raw: IO[bytes], suffix: str) -> IO[bytes]:
    """Return the bytes of an open file, decompressed as its suffix says; unchanged if it is not in `SUFFIXES`."""
    reader = _READERS.get(suffix)
    stream: IO[bytes] = reader(raw) if reader else raw
    return stream
