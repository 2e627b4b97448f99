"""Activations on disk, so that a second SAE on the same model needs no forward pass.

    cache = ActivationCache.open(folder, limit_gb=50, model=info.fingerprint(), dtype="float32")
    model = CachedModel(cache, lambda sites: info.load(sites, "cpu", "float32"), sites, torch.device("cpu"))
    model.activations(ids, lengths)            # as of a `LanguageModel`, which is loaded when a text is not on disk

Content-addressed: a text is its token ids, a folder is one model, revision and dtype. A shard is a safetensors file of
the texts of one forward pass, written whole or not at all, memory-mapped, and checked against its own sha256 when it
is first read. Several processes may read and write one cache. What was read longest ago goes when room is needed;
shards of a run that is under way are left to it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from errors import RequestError
from file_lock import Locked, exclusive
from language_model import LanguageModel, Site
from whole_file import replacing, sweep

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
OPEN_SHARDS = 16
"""Mapped at a time: what was read of a mapping counts as the process's memory until it is closed."""


@dataclass(frozen=True)
class _Place:
    """Where a text's activations are in a shard."""

    shard: str  # its file's name
    start: int  # first row
    stop: int


class ActivationCache:
    """The shards of one model, revision and dtype."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self._limit = folder, limit
        self._opened = time.time()
        self._lock = threading.Lock()
        self._places: dict[tuple[Site, str], _Place] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}  # by shard, memory-mapped: those that were read last
        self._whole: set[str] = set()  # shards that were found to be what was written
        self._full, self._bytes = False, 0

    @classmethod
    def open(cls, root: Path, limit_gb: float, model: str, dtype: str) -> ActivationCache:
        """The cache of a model (its fingerprint) below `root`. Raises `RequestError` if it cannot be written to."""
        folder = root / f"{model[:32]}-{dtype}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder, f"*{SUFFIX}")
        except OSError as error:
            raise RequestError(f"--cache_dir {root}: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise RequestError(f"--cache_dir {root}: cannot be written to")
        cache = cls(folder, int(limit_gb * 1024**3))
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            cache._enter(path)
            cache._bytes += path.stat().st_size if path.exists() else 0
        return cache

    def get(self, sites: Collection[Site], texts: Sequence[str]) -> dict[str, dict[Site, Tensor]]:
        """Those of the texts (by `text_key`) that are here at all of the sites: [tokens, d] at each."""
        found: dict[str, dict[Site, Tensor]] = {}
        for text in texts:
            rows = {site: self._rows(site, text) for site in sites}
            if all(x is not None for x in rows.values()):
                found[text] = {site: x for site, x in rows.items() if x is not None}
        return found

    def put(self, texts: Sequence[str], activations: Mapping[Site, Tensor], lengths: Sequence[int]) -> None:
        """Keep [texts, tokens, d] of right-padded texts. A disk that cannot take it is told once, and no error."""
        if self._full:
            return
        stops = np.cumsum(lengths).tolist()
        tensors = {
            _name(site): torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)]).cpu()
            for site, x in activations.items()
        }
        header = {"texts": json.dumps(list(texts)), "stops": json.dumps(stops), "sha256": _digest(tensors)}
        name = hashlib.sha256(json.dumps([sorted(tensors), list(texts)]).encode()).hexdigest()[:32]
        path = self.folder / f"{name}{SUFFIX}"
        try:
            content = save(tensors, header)
            self._make_room(len(content))
            if not self._full:
                with replacing(path, "wb", sync=False) as file:  # its sha256 tells what a power cut would leave
                    file.write(content)
                self._enter(path)
        except OSError as error:
            self._full = True
            log.warning("--cache_dir: %s: activations are not kept from here on", error)

    def _rows(self, site: Site, text: str) -> Tensor | None:
        place = self._places.get((site, text))
        if place is None:
            return None
        with self._lock:
            tensors = self._tensors.get(place.shard)
            if tensors is None:
                tensors = self._tensors[place.shard] = self._read(place.shard)
                while len(self._tensors) > OPEN_SHARDS:
                    self._tensors.pop(next(iter(self._tensors)))
        x = tensors.get(_name(site))
        return None if x is None else x[place.start : place.stop]

    def _read(self, shard: str) -> dict[str, Tensor]:
        """Map a shard, and the first time hold it against its sha256; one that is broken or gone has nothing."""
        path = self.folder / shard
        try:
            if shard in self._whole:
                return load_file(path)
            with safe_open(path, framework="pt") as file:
                expected = file.metadata()["sha256"]
            tensors = load_file(path)
            if _digest(tensors) != expected:
                raise ValueError("its content is not what was written")
            os.utime(path)  # read now: the last to go
        except FileNotFoundError:
            return {}  # another process needed the room
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("--cache_dir: %s is broken (%s): its texts are run again", path, error)
            with suppress(OSError):
                path.unlink()
            return {}
        self._whole.add(shard)
        return tensors

    def _enter(self, path: Path) -> None:
        """Note what a shard holds, by its header alone."""
        try:
            with safe_open(path, framework="pt") as file:
                header, names = file.metadata(), list(file.keys())
            texts, stops = json.loads(header["texts"]), json.loads(header["stops"])
            places = [_Place(path.name, a, b) for a, b in zip([0, *stops], stops, strict=False)]
            entries = {(_site(name), text): place for name in names for text, place in zip(texts, places, strict=True)}
        except FileNotFoundError:
            return
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("--cache_dir: %s is broken (%s): its texts are run again", path, error)
            return
        with self._lock:
            self._places |= entries

    def _make_room(self, n_bytes: int) -> None:
        """Remove shards that nobody has read for longest, those of this run excepted; full if that is not enough."""
        self._bytes += n_bytes
        if self._bytes <= self._limit:
            return
        with suppress(Locked), exclusive(self.folder / "eviction"):  # somebody else is at it: that is room too
            shards = sorted((stat.st_mtime, stat.st_size, path) for path, stat in _stats(self.folder))
            self._bytes = sum(size for _, size, _ in shards) + n_bytes  # others may have written, or removed
            for read, size, path in shards:
                if self._bytes <= self._limit or read >= self._opened:
                    break
                path.unlink(missing_ok=True)
                self._bytes -= size
            if self._bytes > self._limit:
                self._full = True
                log.warning("--cache_dir: full at %.1f GB: further activations are not kept", self._limit / 1024**3)


class CachedModel:
    """A language model that runs only those texts whose activations are not on disk.

    Texts are batched in one way for the run and in others for the samples drawn before it, and their activations
    differ in the last bits by the company they were in. So what is for different purposes is kept apart: a run with a
    cache gives the numbers of one without.
    """

    def __init__(
        self,
        cache: ActivationCache,
        load: Callable[[Collection[Site]], LanguageModel],
        sites: Collection[Site],
        device: torch.device,
        purpose: str = "preflight",
    ) -> None:
        self.sites, self.device = frozenset(sites), device
        self._cache, self._load, self._purpose = cache, load, purpose
        self._model: LanguageModel | None = None
        self._lock = threading.Lock()

    def activations(self, ids: Tensor, lengths: Tensor) -> dict[Site, Tensor]:
        """As of a `LanguageModel`: site -> [texts, tokens, d]; zeros at padded positions."""
        counts = lengths.tolist()
        texts = [text_key(row[:n], self._purpose) for row, n in zip(ids, counts, strict=True)]
        found = self._cache.get(self.sites, texts)
        missing = [i for i, text in enumerate(texts) if text not in found]
        if missing:
            width = max(counts[i] for i in missing)
            fresh = self._loaded().activations(ids[missing, :width], lengths[missing])
            self._cache.put([texts[i] for i in missing], fresh, [counts[i] for i in missing])
            if len(missing) == len(texts):
                return fresh
            for row, i in enumerate(missing):
                found[texts[i]] = {site: x[row, : counts[i]] for site, x in fresh.items()}
        return {site: self._padded([found[text][site] for text in texts], ids.shape[1]) for site in self.sites}

    def only(self, sites: Collection[Site]) -> CachedModel:
        """This model with some of its sites."""
        fewer = CachedModel(self._cache, self._load, sites, self.device, self._purpose)
        fewer._model = None if self._model is None else self._model.only(sites)
        return fewer

    def apart(self, purpose: str) -> CachedModel:
        """This model for batches of another kind; it is loaded once for both."""
        return CachedModel(self._cache, lambda _: self._loaded(), self.sites, self.device, purpose)

    def _loaded(self) -> LanguageModel:
        with self._lock:
            if self._model is None:
                self._model = self._load(self.sites)
            return self._model

    def _padded(self, rows: Sequence[Tensor], width: int) -> Tensor:
        x = torch.zeros(len(rows), width, rows[0].shape[1], dtype=rows[0].dtype)
        for i, row in enumerate(rows):
            x[i, : len(row)] = row
        return x.to(self.device, non_blocking=True)


def text_key(ids: Tensor, purpose: str) -> str:
    """A text by its token ids [tokens], BOS among them, and what it was run for: 32 hex digits."""
    return hashlib.blake2b(ids.to(torch.int32).numpy().tobytes(), digest_size=16, person=purpose.encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _name(site: Site) -> str:
    return f"{site.layer} {site.hookpoint}"


def _site(name: str) -> Site:
    layer, _, hookpoint = name.partition(" ")
    return Site(int(layer), hookpoint)


def _stats(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob(f"*{SUFFIX}"):
        with suppress(FileNotFoundError):
            yield path, path.stat()
