"""Rows of activations by site and view, until their datasets have been probed.

In memory while they are few; beyond the limit in memory-mapped temporary files, slower but whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from activations import LayerRows, SaeId
from language_model import Site


class NonFiniteError(ValueError):
    """NaN or Inf where a number belongs."""


class RowStore:
    """float32 matrices [n_rows, d], one for each site's x and for each SAE's reconstruction of it."""

    def __init__(
        self, views: Iterable[tuple[Site, SaeId | None]], n_rows: int, d: int, device: torch.device, max_bytes: int
    ) -> None:
        views = list(views)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        n_bytes = len(views) * n_rows * d * 4
        if device.type == "cuda" and n_bytes < torch.cuda.mem_get_info(device)[0] // 2:
            self._rows = {view: torch.empty(n_rows, d, device=device) for view in views}
        elif n_bytes <= max_bytes:
            self._rows = {view: torch.empty(n_rows, d) for view in views}
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="delta-selectivity-")
            paths = [Path(self._folder.name) / f"{i}.f32" for i in range(len(views))]
            self._rows = {
                view: torch.from_file(str(path), shared=True, size=n_rows * d).view(n_rows, d)
                for view, path in zip(views, paths, strict=True)
            }

    @property
    def spilled(self) -> bool:
        """Whether the rows live in files."""
        return self._folder is not None

    def put(self, rows: LayerRows) -> None:
        """Keep a batch's rows. Raises `NonFiniteError`, naming site and row, on NaN or Inf."""
        for sae_id, values in ((None, rows.x), *rows.recons.items()):
            target = self._rows[rows.site, sae_id]
            values = values.to(target.device)
            finite = torch.isfinite(values).all(dim=1)
            if not bool(finite.all()):
                row = int(rows.row_ids[torch.nonzero(~finite.cpu())[0, 0]])
                what = "activation" if sae_id is None else f"reconstruction by SAE {sae_id}"
                raise NonFiniteError(f"layer {rows.site.layer}, row {row}: the {what} has NaN or Inf")
            target[rows.row_ids.to(target.device)] = values

    def get(self, site: Site, sae_id: SaeId | None, row_ids: Tensor, device: torch.device) -> Tensor:
        """Rows [len(row_ids), d] of x (`sae_id` None) or of an SAE's reconstruction, on `device`."""
        source = self._rows[site, sae_id]
        return source.index_select(0, row_ids.to(source.device)).to(device)

    def close(self) -> None:
        """Let go of the rows and of their files."""
        self._rows = {}
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> RowStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
