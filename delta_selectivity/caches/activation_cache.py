"""On-disk cache of activations: a second SAE on the same model and texts needs no forward pass.

    cache = ActivationCache.open(folder, limit_gb=50, model=info.fingerprint(), dtype="float32")
    model = CachedModel(cache, lambda sites: info.load(sites, "cpu", "float32"), sites, torch.device("cpu"))
    model.token_rows(ids, lengths)             # as `LanguageModel.token_rows`; loads the model if a text is not cached

The cache is content-addressed: a folder belongs to one model, revision and dtype, a shard (`shard_folder`) holds the
texts of one forward pass, and a text is identified by its token ids.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from delta_selectivity.caches.shard_folder import BROKEN, ShardFolder
from delta_selectivity.models.language_model import LanguageModel, Site

OPEN_SHARDS = 16
"""Maximum number of memory-mapped shards: pages that were read count as memory of the process until unmapped."""


@dataclass(frozen=True)
class _Location:
    """Location of a text's activations in a shard."""

    shard: str  # name of the shard
    start: int  # first row
    stop: int  # row after the last


class ActivationCache:
    """The cached activations of one model, revision and dtype."""

    def __init__(self, shards: ShardFolder) -> None:
        self._shards = shards
        self._lock = threading.Lock()
        self._places: dict[Site, dict[str, _Location]] = {}  # by text
        self._tensors: dict[str, dict[str, Tensor]] = {}  # by shard, memory-mapped; the most recently opened ones

    @classmethod
    def open(cls, root: Path, limit_gb: float, model: str, dtype: str) -> ActivationCache:
        """Open the cache of a model (by its fingerprint) below `root`. Raises `RequestError` if it is not writable."""
        cache = cls(ShardFolder.open(root, f"{model[:32]}-{dtype}", limit_gb, "activations"))
        for name in cache._shards.names():
            cache._index_shard(name)
        return cache

    def get(self, sites: Collection[Site], texts: Sequence[str]) -> dict[str, dict[Site, Tensor]]:
        """Return the activations `[tokens, d]` of those texts (by `text_key`) that are cached at all of the sites."""
        wanted = [(site, _name(site), self._places.get(site, {})) for site in sites]
        shards: dict[str, dict[str, Tensor]] = {}
        found: dict[str, dict[Site, Tensor]] = {}
        for text in texts:
            rows = found.setdefault(text, {})
            for site, name, places in wanted:
                place = places.get(text)
                if place is None:
                    continue
                if place.shard not in shards:
                    shards[place.shard] = self._tensors_of(place.shard)
                x = shards[place.shard].get(name)
                if x is not None:
                    rows[site] = x[place.start : place.stop]
        return {text: rows for text, rows in found.items() if len(rows) == len(wanted)}

    def put(self, texts: Sequence[str], rows: Mapping[Site, Tensor], lengths: Sequence[int]) -> None:
        """Store the concatenated rows `[tokens, d]` of texts, unless the cache is full."""
        if self._shards.full:
            return
        stops = np.cumsum(lengths).tolist()
        tensors = {_name(site): x.cpu() for site, x in rows.items()}
        name = hashlib.sha256(json.dumps([sorted(tensors), list(texts)]).encode()).hexdigest()[:32]
        if self._shards.write(name, tensors, {"texts": json.dumps(list(texts)), "stops": json.dumps(stops)}):
            self._index_shard(name)

    def _tensors_of(self, shard: str) -> dict[str, Tensor]:
        """Return a shard's tensors by name; empty if it is broken or was removed."""
        with self._lock:
            tensors = self._tensors.get(shard)
        if tensors is None:
            tensors = self._shards.read(shard)  # two threads may read the same shard; this avoids waiting
            with self._lock:
                self._tensors[shard] = tensors
                while len(self._tensors) > OPEN_SHARDS:
                    self._tensors.pop(next(iter(self._tensors)))
        return tensors

    def _index_shard(self, shard: str) -> None:
        """Index the content of a shard, read from its header only."""
        found = self._shards.header(shard)
        if found is None:
            return
        header, names = found
        try:
            texts, stops = json.loads(header["texts"]), json.loads(header["stops"])
            places = [_Location(shard, a, b) for a, b in zip([0, *stops], stops, strict=False)]
            entries = dict(zip(texts, places, strict=True))
            sites = [_site(name) for name in names]
        except BROKEN as error:
            self._shards.drop(shard, error)
            return
        with self._lock:
            for site in sites:
                self._places.setdefault(site, {}).update(entries)


class CachedModel:
    """A language model that runs only for texts whose activations are not on disk.

    The last bits of activations depend on the batch. A run batches its texts differently from the samples before it, so
    activations are cached separately by purpose, and a run with a cache gives the same numbers as one without.
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

    def token_rows(self, ids: Tensor, lengths: Tensor, skip: int = 0) -> dict[Site, Tensor]:
        """Return activations as `LanguageModel.token_rows` does: site -> [rows, d]."""
        counts = lengths.tolist()
        texts = [text_key(row[:n], self._purpose) for row, n in zip(ids, counts, strict=True)]
        found = self._cache.get(self.sites, texts)
        missing = [i for i, text in enumerate(texts) if text not in found]
        if missing:
            width = max(counts[i] for i in missing)
            fresh = self._loaded().token_rows(ids[missing, :width], lengths[missing])
            self._cache.put([texts[i] for i in missing], fresh, [counts[i] for i in missing])
            if len(missing) == len(texts) and not skip:
                return fresh
            parts = {site: x.split([counts[i] for i in missing]) for site, x in fresh.items()}
            for row, i in enumerate(missing):
                found[texts[i]] = {site: of_text[row] for site, of_text in parts.items()}
        return {site: self._concatenate([found[text][site][skip:] for text in texts]) for site in self.sites}

    def restricted_to(self, sites: Collection[Site]) -> CachedModel:
        """Return this model restricted to some of its sites."""
        restricted = CachedModel(self._cache, self._load, sites, self.device, self._purpose)
        restricted._model = None if self._model is None else self._model.restricted_to(sites)
        return restricted

    def with_purpose(self, purpose: str) -> CachedModel:
        """Return this model with a separate cache for another purpose; both share the loaded model."""
        return CachedModel(self._cache, lambda _: self._loaded(), self.sites, self.device, purpose)

    def _loaded(self) -> LanguageModel:
        with self._lock:
            if self._model is None:
                self._model = self._load(self.sites)
            return self._model

    def _concatenate(self, parts: list[Tensor]) -> Tensor:
        """Concatenate the parts on the model's device, with a single transfer."""
        on_one_device = parts if len({part.device for part in parts}) == 1 else [part.cpu() for part in parts]
        return torch.cat(on_one_device).to(self.device, non_blocking=True)


def text_key(ids: Tensor, purpose: str) -> str:
    """Return the key of a text's token ids [tokens], including BOS, and its purpose: 32 hex digits."""
    return hashlib.blake2b(ids.to(torch.int32).numpy().tobytes(), digest_size=16, person=purpose.encode()).hexdigest()


def _name(site: Site) -> str:
    return f"{site.layer} {site.hookpoint}"


def _site(name: str) -> Site:
    layer, _, hookpoint = name.partition(" ")
    return Site(int(layer), hookpoint)
