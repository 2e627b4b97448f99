"""Rows of activations by site and view, until their datasets have been probed.

In memory while they are few; beyond the limit in memory-mapped temporary files, slower but whole. The files have no
names, so that the kernel takes them back whatever ends the process, and all of their room, so that a full disk is an
error here and not a signal at some later store.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor

from activations import NO_MENTION, LayerRows, SaeId
from language_model import Site


class NonFiniteError(ValueError):
    """NaN or Inf where a number belongs."""

    def __init__(self, site: Site, sae_id: SaeId | None, mention: int) -> None:
        super().__init__(f"NaN or Inf at {site}, SAE {sae_id}, mention {mention}")
        self.site = site
        self.sae_id = sae_id  # None: in the activation itself
        self.mention = mention  # index into ProbeTexts.mentions


class RowStore:
    """float32 matrices [n_rows, d], one for each site's x and for each SAE's reconstruction of it."""

    def __init__(
        self, views: Iterable[tuple[Site, SaeId | None]], n_rows: int, d: int, device: torch.device, max_bytes: int
    ) -> None:
        views = list(views)
        self.spilled = False  # whether the rows live in files
        n_bytes = len(views) * n_rows * d * 4
        if device.type == "cuda" and n_bytes < torch.cuda.mem_get_info(device)[0] // 2:
            self._rows = {view: torch.empty(n_rows, d, device=device) for view in views}
        elif n_bytes <= max_bytes:
            self._rows = {view: torch.empty(n_rows, d) for view in views}
        else:
            self.spilled = True
            self._rows = {view: _in_file(n_rows, d) for view in views}

    def put(self, rows: LayerRows) -> None:
        """Keep a batch's rows. Raises `NonFiniteError` if NaN or Inf is at any token of its texts."""
        for sae_id, values in ((None, rows.x), *rows.recons.items()):
            mention = int(rows.broken[sae_id])
            if mention != NO_MENTION:
                raise NonFiniteError(rows.site, sae_id, mention)
            target = self._rows[rows.site, sae_id]
            target[rows.row_ids.to(target.device)] = values.to(target.device)

    def get(self, site: Site, sae_id: SaeId | None, row_ids: Tensor, device: torch.device) -> Tensor:
        """Rows [len(row_ids), d] of x (`sae_id` None) or of an SAE's reconstruction, on `device`."""
        source = self._rows[site, sae_id]
        return source.index_select(0, row_ids.to(source.device)).to(device)

    def close(self) -> None:
        """Let go of the rows and of their files."""
        self._rows = {}

    def __enter__(self) -> RowStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _in_file(n_rows: int, d: int) -> Tensor:
    """A matrix [n_rows, d] in a temporary file. Raises OSError if the disk has no room for all of it."""
    with tempfile.NamedTemporaryFile(prefix="delta-selectivity-") as file:
        os.posix_fallocate(file.fileno(), 0, max(n_rows * d * 4, 1))
        return torch.from_file(file.name, shared=True, size=n_rows * d).view(n_rows, d)
