"""Activations of the same texts, computed once and kept in memory."""

from __future__ import annotations

import threading
from collections.abc import Collection

import torch
from torch import Tensor

from delta_selectivity.models.language_model import ActivationSource, Site


class ResidentModel:
    """A model whose activations stay in memory, batch by batch, as far as there is room.

    Batches that do not fit are computed again at each request.
    """

    def __init__(self, model: ActivationSource, limit_bytes: int) -> None:
        """Take a model with hooks at the sites that will be asked for; limit_bytes: room for its activations."""
        self._model, self._free_bytes = model, limit_bytes
        self._stored: dict[tuple[bytes, int], dict[Site, Tensor]] = {}
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        """Device of the activations."""
        return self._model.device

    def token_rows(self, ids: Tensor, lengths: Tensor, skip: int = 0) -> dict[Site, Tensor]:
        """Return the rows of real tokens, as of a `LanguageModel`: site -> [rows, d]."""
        name = (ids.numpy().tobytes(), skip)
        with self._lock:
            kept = self._stored.get(name)
        if kept is not None:
            return dict(kept)  # a copy, since the caller removes sites
        rows = self._model.token_rows(ids, lengths, skip)
        size = sum(x.nbytes for x in rows.values())
        with self._lock:
            if name not in self._stored and size <= self._free_bytes:
                self._free_bytes -= size
                self._stored[name] = dict(rows)
        return rows

    def restricted_to(self, sites: Collection[Site]) -> ResidentModel:
        """Return this model with some of its sites, and nothing kept yet."""
        return ResidentModel(self._model.restricted_to(sites), self._free_bytes)
