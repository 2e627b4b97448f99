"""Size-limited on-disk tensor cache: atomic writes, checksums on first read.

    shards = ShardFolder.open(root, "probes", limit_gb=50, what="probe fits")
    shards.write(name, {"coef": coef}, {"of": "layer 3"})   # name: 32 hexadecimal digits that tell the content
    shards.read(name)                                       # {} if it is not there, or not what was written

A shard is a safetensors file, written whole or not at all, memory-mapped, and held against its own checksum when it is
first read. Several processes may read and write below one root; what all its folders hold counts towards one limit.
What was read longest ago goes when room is needed, files dated in the future first; what this run has read or written
stays, by its name, and what others have since this run began. Nothing that goes wrong
here is an error of the run: it computes again.
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
CHECKSUM = "xxh3_128"  # its key in a shard's header
BROKEN = (OSError, SafetensorError, ValueError, KeyError, TypeError)
"""What reading a file that is not what was written may raise."""

_NAME = "[0-9a-f]" * 32  # of a shard, as a glob pattern: nothing else below the root is ever removed
_LEFT_OVER = 3600.0  # s after which an unfinished file is nobody's
_GRANT = 100  # a process looks what others have written at the latest when it has written this part of the limit


class ShardFolder:
    """The shards of one kind below a root that may hold no more than so many bytes."""

    def __init__(self, root: Path, name: str, limit: int, what: str) -> None:
        self.folder = root / name
        self.full = False  # whether nothing more is kept
        self._root, self._limit, self._what = root, limit, what
        self._opened = 0.0  # by the clock of the file system
        self._own: set[Path] = set()  # what this run has read or written
        self._granted = 0  # bytes that may be written before another look at what is there
        self._whole: set[str] = set()  # names of shards that were found to be what was written
        self._lock = threading.Lock()

    @classmethod
    def open(cls, root: Path, name: str, limit_gb: float, what: str) -> ShardFolder:
        """The folder of this name below `root`; `what` it holds is for warnings.

        Raises `RequestError` if it cannot be written to.
        """
        shards = cls(root, name, as_bytes(limit_gb), what)
        try:
            shards.folder.mkdir(parents=True, exist_ok=True)
            sweep(shards.folder, f"*{SUFFIX}", _LEFT_OVER)
            shards._opened = shards._now()
        except OSError as error:
            raise RequestError(f"`cache` {root}: {error.strerror}") from error
        if not os.access(shards.folder, os.W_OK):
            raise RequestError(f"`cache` {root}: cannot be written to")
        return shards

    def _now(self) -> float:
        """By the clock of the file system."""
        os.utime(self.folder)
        return self.folder.stat().st_mtime

    def names(self) -> list[str]:
        """Of all shards that are here now."""
        return sorted(path.stem for path in self.folder.glob(f"{_NAME}{SUFFIX}"))

    def read(self, name: str) -> dict[str, Tensor]:
        """Map a shard's tensors, and the first time hold them against their checksum; one that is gone has none."""
        path = self._path(name)
        self._own.add(path)
        try:
            if name in self._whole:
                return load_file(path)
            with safe_open(path, framework="pt") as file:
                header = dict(file.metadata())
            tensors = load_file(path)
            if header.pop(CHECKSUM) != digest({**header, "name": name}, tensors):
                raise ValueError("its content is not what was written")
        except FileNotFoundError:
            return {}  # it never was here, or another process needed the room
        except BROKEN as error:
            self.drop(name, error)
            return {}
        self._whole.add(name)
        with suppress(OSError):  # another user's: it may be read
            os.utime(path)  # read now: the last to go
        return tensors

    def header(self, name: str) -> tuple[dict[str, str], list[str]] | None:
        """What was written beside a shard's tensors, and their names; not checked yet. None if it is broken or gone."""
        try:
            with safe_open(self._path(name), framework="numpy") as file:  # torch would map all of it
                return dict(file.metadata()), list(file.keys())
        except FileNotFoundError:
            return None
        except BROKEN as error:
            self.drop(name, error)
            return None

    def drop(self, name: str, error: Exception) -> None:
        """Tell that a shard is broken, and remove it."""
        log.warning("`cache`: %s is broken (%s): its %s are computed again", self._path(name), error, self._what)
        with suppress(OSError):
            self._path(name).unlink()

    def write(self, name: str, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bool:
        """Keep contiguous tensors on the CPU; whether they were. A disk that cannot take them is told once."""
        if self.full:
            return False
        content = save(dict(tensors), {**header, CHECKSUM: digest({**header, "name": name}, tensors)})
        self._own.add(self._path(name))
        try:
            if not self._has_room(len(content)):
                self.full = True
                log.warning("`cache`: full at %.1f GB: further %s are not kept", self._limit / 1024**3, self._what)
                return False
            with replacing(
                self._path(name), "wb", sync=False
            ) as file:  # its checksum tells what a power cut would leave
                file.write(content)
        except OSError as error:
            self.full = True
            log.warning("`cache`: %s: %s are not kept from here on", error, self._what)
            return False
        return True

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def _has_room(self, n_bytes: int) -> bool:
        """Whether so many more may be written, once shards that nobody has read for longest are removed."""
        with self._lock:
            self._granted -= n_bytes
            if self._granted >= 0:
                return True
            with suppress(Locked), exclusive(self._root / "eviction"):  # else somebody is at it: that is room too
                found = [(stat.st_mtime, stat.st_size, path) for path, stat in _stats(self._root)]
                now = self._now()
                left = self._limit - n_bytes - sum(size for _, size, _ in found)
                old = [shard for shard in found if not self._opened <= shard[0] <= now and shard[2] not in self._own]
                for _, size, path in sorted(old, key=lambda shard: (shard[0] <= now, shard[0])):
                    if left >= 0:
                        break
                    path.unlink(missing_ok=True)
                    left += size
                self._granted = min(left, self._limit // _GRANT)
                return left >= 0
            return True


def digest(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """XXH3 (32 hexadecimal digits) of facts and of tensors on the CPU, with their names, types and shapes.

    It tells what is damaged or different, at the speed of memory; no forgery of it is hard to make.
    """
    found = xxhash.xxh3_128(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        if tensor.numel():  # torch has no bytes of nothing
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _stats(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in root.glob(f"*/{_NAME}{SUFFIX}"):
        with suppress(FileNotFoundError):
            yield path, path.stat()
