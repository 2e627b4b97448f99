"""Size-limited on-disk tensor cache: atomic writes, checksums on first read.

    shards = ShardFolder.open(root, "probes", limit_gb=50, what="probe fits")
    shards.write(name, {"coef": coef}, {"of": "layer 3"})   # name: hash of the content's inputs, 32 hex digits
    shards.read(name)                                       # {} if missing or damaged

A shard is a safetensors file that is written atomically, memory-mapped, and verified by its checksum when first read.
Several processes may share a root; one size limit applies to all its folders together.

When space is needed, the least recently used shards are removed; shards dated in the future go first. Shards that this
run has used, or that others have used since it began, are kept. Cache failures never fail the run, which computes the
data again.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.system.file_lock import Locked, exclusive
from delta_selectivity.system.memory import as_bytes
from delta_selectivity.system.whole_file import replacing, sweep

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
CHECKSUM = "xxh3_128"  # key in a shard's header
BROKEN = (OSError, SafetensorError, ValueError, KeyError, TypeError)
"""Exceptions from reading a damaged file."""

_NAME = "[0-9a-f]" * 32  # glob pattern of shard names; no other files below the root are removed
_ABANDONED = 3600.0  # age in seconds from which an unfinished file is considered abandoned
_GRANT = 100  # a process rechecks the total size after writing at most limit / this


class ShardFolder:
    """The shards of one kind below a root with a size limit."""

    def __init__(self, root: Path, name: str, limit: int, what: str) -> None:
        self.folder = root / name
        self.full = False  # whether no more shards are stored
        self._root, self._limit, self._what = root, limit, what
        self._opened = 0.0  # time by the file system's clock
        self._used: set[Path] = set()  # shards that this run has read or written
        self._granted = 0  # bytes that may be written before the next check of the total size
        self._verified: set[str] = set()  # names of verified shards
        self._lock = threading.Lock()

    @classmethod
    def open(cls, root: Path, name: str, limit_gb: float, what: str) -> ShardFolder:
        """Open the folder of this name below `root`; ``what`` describes the content in warnings.

        Raises `RequestError` if it is not writable.
        """
        shards = cls(root, name, as_bytes(limit_gb), what)
        try:
            shards.folder.mkdir(parents=True, exist_ok=True)
            sweep(shards.folder, f"*{SUFFIX}", _ABANDONED)
            shards._opened = shards._now()
        except OSError as error:
            raise RequestError(f"`cache` {root}: {error.strerror}") from error
        if not os.access(shards.folder, os.W_OK):
            raise RequestError(f"`cache` {root}: the folder is not writable")
        return shards

    def _now(self) -> float:
        """Return the time by the file system's clock."""
        os.utime(self.folder)
        return self.folder.stat().st_mtime

    def names(self) -> list[str]:
        """Return the names of all shards in the folder."""
        return sorted(path.stem for path in self.folder.glob(f"{_NAME}{SUFFIX}"))

    def read(self, name: str) -> dict[str, Tensor]:
        """Memory-map a shard's tensors, verified by checksum on first read; return {} if it is missing or damaged."""
        path = self._path(name)
        self._used.add(path)
        try:
            if name in self._verified:
                return load_file(path)
            with safe_open(path, framework="pt") as file:
                header = dict(file.metadata())
            tensors = load_file(path)
            if header.pop(CHECKSUM) != digest({**header, "name": name}, tensors):
                raise ValueError("the checksum does not match")
        except FileNotFoundError:
            return {}  # not cached, or removed by another process
        except BROKEN as error:
            self.drop(name, error)
            return {}
        self._verified.add(name)
        with suppress(OSError):  # fails for another user's file, which may still be read
            os.utime(path)  # mark as recently used
        return tensors

    def header(self, name: str) -> tuple[dict[str, str], list[str]] | None:
        """Return a shard's metadata and tensor names without verification; None if it is missing or damaged."""
        try:
            with safe_open(self._path(name), framework="numpy") as file:  # torch would map the whole file
                return dict(file.metadata()), list(file.keys())
        except FileNotFoundError:
            return None
        except BROKEN as error:
            self.drop(name, error)
            return None

    def drop(self, name: str, error: Exception) -> None:
        """Log that a shard is damaged, and remove it."""
        log.warning("`cache`: %s is damaged (%s): its %s are computed again", self._path(name), error, self._what)
        with suppress(OSError):
            self._path(name).unlink()

    def write(self, name: str, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:
        """Store contiguous CPU tensors; return whether they were stored. A disk failure is logged once."""
        if self.full:
            return False
        content = save(dict(tensors), {**header, CHECKSUM: digest({**header, "name": name}, tensors)})
        self._used.add(self._path(name))
        try:
            if not self._reserve(len(content)):
                self._stop("`cache`: full at %.1f GB: further %s are not cached", self._limit / 1024**3)
                return False
            with replacing(
                self._path(name), "wb", sync=False
            ) as file:  # the checksum detects damage by a power failure
                file.write(content)
        except OSError as error:
            self._stop("`cache`: %s: %s are not cached from now on", error)
            return False
        return True

    def _stop(self, message: str, reason: object) -> None:
        """Store nothing from now on; the first thread to find out logs the message, of the reason and the content."""
        with self._lock:
            is_first, self.full = not self.full, True
        if is_first:
            log.warning(message, reason, self._what)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def _reserve(self, n_bytes: int) -> bool:
        """Return whether this many bytes may be written, after removing the least recently used shards if needed."""
        with self._lock:
            self._granted -= n_bytes
            if self._granted >= 0:
                return True
            with suppress(Locked), exclusive(self._root / "eviction"):  # if locked, another process is freeing space
                found = [(stat.st_mtime, stat.st_size, path) for path, stat in _stats(self._root)]
                now = self._now()
                free = self._limit - n_bytes - sum(size for _, size, _ in found)
                old = [shard for shard in found if not self._opened <= shard[0] <= now and shard[2] not in self._used]
                for _, size, path in sorted(old, key=lambda shard: (shard[0] <= now, shard[0])):
                    if free >= 0:
                        break
                    path.unlink(missing_ok=True)
                    free += size
                self._granted = min(free, self._limit // _GRANT)
                return free >= 0
            return True


def digest(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the XXH3 (32 hex digits) of facts and CPU tensors, with names, dtypes and shapes.

    It is as fast as memory, and detects corruption, not tampering.
    """
    found = xxhash.xxh3_128(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        if tensor.numel():  # torch cannot view empty tensors as bytes
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _stats(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in root.glob(f"*/{_NAME}{SUFFIX}"):
        with suppress(FileNotFoundError):
            yield path, path.stat()
