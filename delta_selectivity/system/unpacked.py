"""Bounds on what a packed file may unpack to, counted before the memory or the disk for it is taken.

check_size(4 * 2**30, path)        # TooLarge: it unpacks to 4096 MiB or more from 0.1: that is refused
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

MOST_TIMES = 100  # a packed file that unpacks to more than this times its size, and to more than `ALWAYS`, is refused
ALWAYS = 256 * 2**20
_PIECE = 2**20


class TooLarge(ValueError):
    """By how much, in one line."""


def is_special(path: Path) -> bool:
    """Whether it is a pipe, a device or a socket, whose reading may never end. Raises OSError if it is not there."""
    mode = path.stat().st_mode
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def check_size(needed: int, path: Path) -> None:
    """Raise `TooLarge` if a packed file needs more memory than there is, or far more than its own size."""
    packed = path.stat().st_size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory or needed > max(ALWAYS, MOST_TIMES * packed):
        raise TooLarge(f"it unpacks to {needed / 2**20:.0f} MiB or more from {packed / 2**20:.1f}: that is refused")


def check_archive(path: Path) -> None:
    """Raise `TooLarge` if a compressed file unpacks to too much; one that cannot be read is left to its reader.

    What a file is, its first bytes say, whatever it is called.
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
