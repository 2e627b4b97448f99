"""On-disk cache of activations: a second SAE on the same model and texts needs no forward pass.

    cache = ActivationCache.open(folder, limit_gb=50, model=info.fingerprint(), dtype="float32")
    model = CachedModel(cache, lambda sites: info.load(sites, "cpu", "float32"), sites, torch.device("cpu"))
    model.token_rows(ids, lengths)             # as `LanguageModel.token_rows`; loads the model if a text is not cached

The cache is content-addressed: a folder belongs to one model, revision and dtype, a shard (`shard_folder`) holds the
texts of one forward pass, and a text is identified by its token ids. Of each text only the tokens that a run needed are
stored: those of the name, and those of the sample for whole-text figures.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from delta_selectivity.caches.shard_folder import BROKEN, ShardFolder
from delta_selectivity.models.language_model import LanguageModel, Site, real_tokens

OPEN_SHARDS = 16
"""Maximum number of memory-mapped shards: pages that were read count as memory of the process until unmapped."""
TOKENS = "tokens"
"""Name of a shard's tensor of positions: the tokens of the texts that its rows belong to, int64 ``[rows]``."""


@dataclass(frozen=True)
class _Location:
    """Location of a text's activations in a shard."""

    shard: str  # name of the shard
    start: int  # first row
    stop: int  # row after the last


class _Rows(NamedTuple):
    """Some rows of a tensor."""

    x: Tensor  # [rows, d]
    rows: NDArray[np.int64]


class ActivationCache:
    """The cached activations of one model, revision and dtype."""

    def __init__(self, shards: ShardFolder) -> None:
        self._shards = shards
        self._lock = threading.Lock()
        self._places: dict[Site, dict[str, list[_Location]]] = {}  # by text, the latest last
        self._tensors: dict[str, dict[str, Tensor]] = {}  # by shard, memory-mapped; the most recently opened ones

    @classmethod
    def open(cls, root: Path, limit_gb: float, model: str, dtype: str) -> ActivationCache:
        """Open the cache of a model (by its fingerprint) below `root`. Raises `RequestError` if it is not writable."""
        cache = cls(ShardFolder.open(root, f"{model[:32]}-{dtype}-rows", limit_gb, "activations"))
        for name in cache._shards.names():
            cache._index_shard(name)
        return cache

    def get(self, sites: Collection[Site], text: str, tokens: NDArray[np.int64]) -> dict[Site, _Rows] | None:
        """Return where the activations of a text (by `text_key`) are, None unless all are cached at all sites.

        tokens: the wanted positions in the text, ascending.
        """
        rows: dict[Site, _Rows] = {}
        index: dict[_Location, NDArray[np.int64] | None] = {}  # of the wanted rows in the shard; shared by sites
        for site in sites:
            for place in reversed(self._places.get(site, {}).get(text, [])):
                shard = self._tensors_of(place.shard)
                if place not in index:
                    index[place] = _index(shard, place, tokens)
                found, x = index[place], shard.get(_name(site))
                if found is not None and x is not None:
                    rows[site] = _Rows(x, found)
                    break
            else:
                return None
        return rows

    def put(self, texts: Sequence[str], rows: Mapping[Site, Tensor], tokens: Sequence[NDArray[np.int64]]) -> None:
        """Store the concatenated rows `[tokens, d]` of texts, with the tokens' positions, unless the cache is full."""
        if self._shards.full:
            return
        stops = np.cumsum([len(of_text) for of_text in tokens]).tolist()
        places = np.concatenate(tokens)
        tensors = {_name(site): x.cpu() for site, x in rows.items()}
        content = json.dumps([sorted(tensors), list(texts), stops]).encode() + places.tobytes()
        name = hashlib.sha256(content).hexdigest()[:32]
        header = {"texts": json.dumps(list(texts)), "stops": json.dumps(stops)}
        if self._shards.write(name, {**tensors, TOKENS: torch.from_numpy(places)}, header):
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
            entries = list(zip(texts, places, strict=True))
            sites = [_site(name) for name in names if name != TOKENS]
        except BROKEN as error:
            self._shards.drop(shard, error)
            return
        with self._lock:
            for site in sites:
                by_text = self._places.setdefault(site, {})
                for text, place in entries:
                    by_text.setdefault(text, []).append(place)


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

    def token_rows(self, ids: Tensor, lengths: Tensor, wanted: Tensor | None = None) -> dict[Site, Tensor]:
        """Return activations as `LanguageModel.token_rows` does: site -> [rows, d]."""
        wanted = real_tokens(ids, lengths) if wanted is None else wanted
        counts = lengths.tolist()
        numbers = ids.to(torch.int32).numpy()
        texts = [text_key(row[:n], self._purpose) for row, n in zip(numbers, counts, strict=True)]
        tokens = [np.flatnonzero(row) for row in wanted.numpy()]
        found = [self._cache.get(self.sites, text, at) for text, at in zip(texts, tokens, strict=True)]
        missing = [i for i, rows in enumerate(found) if rows is None]
        if missing:
            width = max(counts[i] for i in missing)
            fresh = self._loaded().token_rows(ids[missing, :width], lengths[missing], wanted[missing, :width])
            self._cache.put([texts[i] for i in missing], fresh, [tokens[i] for i in missing])
            if len(missing) == len(texts):
                return fresh
            begin = 0
            for i in missing:
                end = begin + len(tokens[i])
                found[i] = {site: _Rows(x, np.arange(begin, end)) for site, x in fresh.items()}
                begin = end
        whole = [rows for rows in found if rows is not None]  # all of them
        return {site: self._concatenate([rows[site] for rows in whole]) for site in self.sites}

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

    def _concatenate(self, parts: list[_Rows]) -> Tensor:
        """Return all rows on the model's device, with a single transfer; those of one tensor are selected at once."""
        found = []
        for _, same in groupby(parts, key=lambda part: id(part.x)):
            of_tensor = list(same)
            found.append(_select(of_tensor[0].x, np.concatenate([part.rows for part in of_tensor])))
        if len(found) > 1:
            on_one_device = len({part.device for part in found}) == 1
            found = [torch.cat(found if on_one_device else [part.cpu() for part in found])]
        return found[0].to(self.device, non_blocking=True)


def _select(x: Tensor, rows: NDArray[np.int64]) -> Tensor:
    """Return rows of x; a view, which copies nothing, if they follow each other."""
    if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return x[int(rows[0]) : int(rows[0]) + len(rows)]
    return x.index_select(0, torch.from_numpy(rows).to(x.device))


def _index(shard: Mapping[str, Tensor], place: _Location, tokens: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Return the rows of some positions of a text in its shard; None unless all are there."""
    if TOKENS not in shard:  # broken or removed
        return None
    stored = shard[TOKENS].numpy()[place.start : place.stop]
    found = np.searchsorted(stored, tokens)
    if len(tokens) and (found[-1] >= len(stored) or not np.array_equal(stored[found], tokens)):
        return None
    return np.asarray(found + place.start)


def text_key(ids: NDArray[np.int32], purpose: str) -> str:
    """Return the key of a text's token ids [tokens], including BOS, and its purpose: 32 hex digits."""
    return hashlib.blake2b(ids.tobytes(), digest_size=16, person=purpose.encode()).hexdigest()


def _name(site: Site) -> str:
    return f"{site.layer} {site.hookpoint}"


def _site(name: str) -> Site:
    layer, _, hookpoint = name.partition(" ")
    return Site(int(layer), hookpoint)
