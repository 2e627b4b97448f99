"""An in-memory cache of activations."""

from __future__ import annotations

import threading
from collections.abc import Collection

import torch
from torch import Tensor

from delta_selectivity.models.language_model import ActivationSource, Site


class ResidentModel:
    """A model whose activations are cached in memory, batch by batch, up to a limit.

    Batches beyond the limit are computed again at each request.
    """

    def __init__(self, model: ActivationSource, limit_bytes: int) -> None:
        """Wrap a model with hooks at the sites to read; limit_bytes: memory for its activations."""
        self._model, self._free_bytes = model, limit_bytes
        self._stored: dict[tuple[bytes, bytes | None], dict[Site, Tensor]] = {}
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        """Device of the activations."""
        return self._model.device

    def token_rows(self, ids: Tensor, lengths: Tensor, wanted: Tensor | None = None) -> dict[Site, Tensor]:
        """Return rows of tokens, as `LanguageModel.token_rows`: site -> [rows, d]."""
        key = (ids.numpy().tobytes(), None if wanted is None else wanted.numpy().tobytes())
        with self._lock:
            stored = self._stored.get(key)
        if stored is not None:
            return dict(stored)  # a copy, since the caller removes sites
        rows = self._model.token_rows(ids, lengths, wanted)
        size = sum(x.nbytes for x in rows.values())
        with self._lock:
            if key not in self._stored and size <= self._free_bytes:
                self._free_bytes -= size
                self._stored[key] = dict(rows)
        return rows

    def restricted_to(self, sites: Collection[Site]) -> ResidentModel:
        """Return this model restricted to some of its sites, with an empty cache."""
        return ResidentModel(self._model.restricted_to(sites), self._free_bytes)
