"""Limits on the size of decompressed files, checked before memory or disk space is used.

check_size(4 * 2**30, path)        # TooLarge: it decompresses from 0.1 MiB to 4096 MiB or more, which is not allowed
check_archive(path)                # the same for .gz, .bz2, .xz, .zst and .zip, read once in small pieces
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import zstandard

MAX_RATIO = 100  # of decompressed to compressed size, for more than `ALWAYS_ALLOWED` bytes
ALWAYS_ALLOWED = 256 * 2**20
_PIECE = 2**20


class TooLarge(ValueError):
    """A file decompresses to too much; the message is one line."""


def is_special(path: Path) -> bool:
    """Return whether a path is a pipe, device or socket, which may never end. Raises OSError if it does not exist."""
    mode = path.stat().st_mode
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def check_size(needed: int, path: Path) -> None:
    """Raise `TooLarge` if the decompressed size exceeds the memory or is far larger than the file."""
    packed = path.stat().st_size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory or needed > max(ALWAYS_ALLOWED, MAX_RATIO * packed):
        raise TooLarge(
            f"it decompresses from {packed / 2**20:.1f} MiB to {needed / 2**20:.0f} MiB or more, which is not allowed"
        )


def check_archive(path: Path) -> None:
    """Raise `TooLarge` if a compressed file decompresses to too much; unreadable files are left to their reader.

    The format is detected from the first bytes, not from the name.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                check_size(sum(member.file_size for member in archive.infolist()), path)
            return
        with path.open("rb") as file:
            magic = file.read(max(map(len, _OPENERS)))
        for first, open_packed in _OPENERS.items():
            if magic.startswith(first):
                with open_packed(path) as unpacked:
                    _count(unpacked, path)
    except (OSError, EOFError, NotImplementedError, *_DAMAGED):
        return


def _count(file: IO[bytes], path: Path) -> None:
    size = 0
    while piece := file.read(_PIECE):
        size += len(piece)
        check_size(size, path)


def _zstd(path: Path) -> Any:
    return zstandard.open(path, "rb", dctx=zstandard.ZstdDecompressor(max_window_size=2**27))


_DAMAGED = (lzma.LZMAError, zlib.error, zipfile.BadZipFile, zstandard.ZstdError)
_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstd,
}
