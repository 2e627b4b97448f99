"""Store SAE codes of probed rows until their datasets are probed.

The number of active latents is not known in advance, so codes are appended batch by batch. They are kept in memory up
to a limit; beyond it, all move to one unnamed temporary file, which the kernel removes however the process ends.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from delta_selectivity.models.language_model import Site
from delta_selectivity.run.activations import SaeId
from delta_selectivity.saes import SparseRows

_ENTRY = np.dtype([("col", np.int32), ("value", np.float32)])


@dataclass
class _View:
    """The codes of one SAE at one site: entry `first[i] + j` is the j-th entry of row i."""

    d_sae: int
    first: NDArray[np.int64]  # [rows], index among the view's entries in memory, or among the file's entries
    count: NDArray[np.int64]  # [rows]; -1: not stored yet
    pieces: list[NDArray[np.void]] = field(default_factory=list)  # arrays of `_ENTRY`, while in memory
    n_entries: int = 0  # in memory


class CodeStore:
    """Sparse float32 matrices [n_rows, d_sae], one for each site and SAE with codes."""

    def __init__(self, n_rows: int, max_bytes: int) -> None:
        self._n_rows, self._max_bytes = n_rows, max_bytes
        self._views: dict[tuple[Site, SaeId], _View] = {}
        self._n_bytes = 0
        self._file: IO[bytes] | None = None

    @property
    def in_file(self) -> bool:
        """Whether the codes are in a file."""
        return self._file is not None

    def put(self, site: Site, sae_id: SaeId, row_ids: Tensor, codes: SparseRows) -> None:
        """Store the codes of these rows (int64 [rows]). Raises OSError if the disk is full."""
        view = self._views.get((site, sae_id))
        if view is None:
            rows = np.zeros(self._n_rows, np.int64), np.full(self._n_rows, -1, np.int64)
            view = self._views[site, sae_id] = _View(codes.n_cols, *rows)
        entries = np.empty(codes.value.numel(), _ENTRY)
        entries["col"], entries["value"] = codes.col.cpu().numpy(), codes.value.cpu().numpy()
        crow, places = codes.crow.cpu().numpy(), row_ids.cpu().numpy()
        view.count[places] = np.diff(crow)
        view.first[places] = crow[:-1] + self._append(view, entries)
        if self._file is None and self._n_bytes > self._max_bytes:
            self._spill()

    def get(self, site: Site, sae_id: SaeId, row_ids: Tensor, device: torch.device) -> Tensor:
        """Return the codes of these rows: a sparse CSR tensor, float32 [len(row_ids), d_sae], on `device`."""
        view, places = self._views[site, sae_id], row_ids.cpu().numpy()
        count = view.count[places]
        assert (count >= 0).all(), "rows are read before they are stored"
        crow = np.concatenate([[0], np.cumsum(count)])
        within = np.arange(crow[-1]) - np.repeat(crow[:-1], count)
        entries = self._entries(view)[np.repeat(view.first[places], count) + within]
        col, value = (torch.from_numpy(np.ascontiguousarray(entries[name])) for name in ("col", "value"))
        return SparseRows(torch.from_numpy(crow), col, value, view.d_sae).to(device).to_csr()

    def close(self) -> None:
        """Release the codes and their file."""
        self._views = {}
        if self._file is not None:
            self._file.close()

    def _append(self, view: _View, entries: NDArray[np.void]) -> int:
        """Append the entries, and return the index of the first."""
        self._n_bytes += entries.nbytes
        if self._file is not None:
            first = self._file.tell() // _ENTRY.itemsize
            self._file.write(entries.tobytes())
            return first
        first = view.n_entries
        view.pieces.append(entries)
        view.n_entries += len(entries)
        return first

    def _spill(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="delta-selectivity-")  # noqa: SIM115 - `close` closes it
        for view in self._views.values():
            pieces, view.pieces = view.pieces, []
            view.first += self._file.tell() // _ENTRY.itemsize
            for piece in pieces:
                self._file.write(piece.tobytes())

    def _entries(self, view: _View) -> NDArray[np.void]:
        """Return the array that `view.first` indexes."""
        if self._file is None:
            view.pieces = [np.concatenate(view.pieces)]  # so that the next call has few pieces
            return view.pieces[0]
        self._file.flush()
        n_entries = os.fstat(self._file.fileno()).st_size // _ENTRY.itemsize
        if not n_entries:  # an empty file cannot be mapped
            return np.empty(0, _ENTRY)
        return np.memmap(self._file, _ENTRY, mode="r", shape=(n_entries,))
