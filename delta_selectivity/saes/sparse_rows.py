"""Sparse codes of many activations in CSR layout."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")  # users cannot act on it


@dataclass(frozen=True)
class SparseRows:
    """The latents of many activations, in sparse form.

    Row ``i`` holds latents ``col[crow[i]:crow[i + 1]]`` with the same slice of ``value``. An entry may be zero (a TopK
    code of a row with fewer than k positive pre-activations); ``l0`` does not count it.
    """

    crow: Tensor  # int64 [rows + 1], start of each row, and the end of the last
    col: Tensor  # int64 or int32 [nnz], latent indices
    value: Tensor  # float32 [nnz], latent activations
    n_cols: int  # number of latents, d_sae
    scale: Tensor | None = None  # [rows], factor of each reconstructed row, if the SAE normalises its input at run time
    shift: Tensor | None = None  # [rows], added to every coordinate of the reconstructed row after scaling
    width: int | None = None  # entries per row, if known to be the same for all; avoids waiting for the device

    @property
    def n_rows(self) -> int:
        """Number of activations."""
        return self.crow.numel() - 1

    @property
    def nbytes(self) -> int:
        """Memory of all tensors, in bytes."""
        tensors = (self.crow, self.col, self.value, self.scale, self.shift)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def l0(self) -> Tensor:
        """Return the number of non-zero latents per row. float32 ``[rows]``."""
        return self._row_sums((self.value != 0).float())

    def l1(self) -> Tensor:
        """Return the sum of absolute latents per row. float32 ``[rows]``."""
        return self._row_sums(self.value.abs())

    def select(self, rows: Tensor) -> SparseRows:
        """Return rows by index (int ``[n]``, any order, repeats allowed) or by mask (bool ``[rows]``)."""
        if rows.dtype == torch.bool:
            rows = rows.nonzero().squeeze(1)
        rows = rows.to(self.crow.device)
        scale = None if self.scale is None else self.scale[rows]
        shift = None if self.shift is None else self.shift[rows]
        if self.width is not None:
            col, value = (entries.view(-1, self.width).index_select(0, rows) for entries in (self.col, self.value))
            return SparseRows(*_fixed_width_layout(col, value), self.n_cols, scale, shift, self.width)
        counts = self.crow.diff()[rows]
        crow = F.pad(counts.cumsum(0), (1, 0))
        within = torch.arange(int(crow[-1]), device=crow.device) - crow[:-1].repeat_interleave(counts)
        entries = self.crow[rows].repeat_interleave(counts) + within
        return SparseRows(crow, self.col[entries], self.value[entries], self.n_cols, scale, shift)

    def means(self, first: Tensor) -> SparseRows:
        """Average each run of rows, where run ``i`` begins at row ``first[i]`` (int ``[runs]``, ascending).

        A latent that fires in several rows of a run has several entries in the mean's row, to be added by the caller.
        ``scale`` and ``shift`` are dropped, because their means are not meaningful.
        """
        crow = F.pad(self.crow[first], (0, 1), value=self.value.numel())
        lengths = F.pad(first, (0, 1), value=self.n_rows).diff()
        share = (1 / lengths).to(self.value.dtype).repeat_interleave(crow.diff(), output_size=self.value.numel())
        return SparseRows(crow, self.col, self.value * share, self.n_cols)

    def to_csr(self) -> Tensor:
        """Return a sparse CSR tensor ``[rows, n_cols]``, without ``scale`` and ``shift``.

        Entries of a row may be unsorted and repeated; matrix products add repeated entries.
        """
        shape = (self.n_rows, self.n_cols)
        return torch.sparse_csr_tensor(self.crow, self.col.long(), self.value, shape, check_invariants=False)

    def to(self, device: torch.device | str) -> SparseRows:
        """Return the same codes on another device."""
        scale = None if self.scale is None else self.scale.to(device)
        shift = None if self.shift is None else self.shift.to(device)
        crow, col, value = self.crow.to(device), self.col.to(device), self.value.to(device)
        return SparseRows(crow, col, value, self.n_cols, scale, shift, self.width)

    @classmethod
    def of_width(cls, col: Tensor, value: Tensor, n_cols: int) -> SparseRows:
        """Return codes with the same number of entries in every row, from latents and activations ``[rows, width]``."""
        return cls(*_fixed_width_layout(col, value), n_cols, width=col.shape[1])

    @staticmethod
    def concat(parts: Sequence[SparseRows]) -> SparseRows:
        """Concatenate the rows of one or more parts, which come from one SAE."""
        if len(parts) == 1:
            return parts[0]
        counts = torch.cat([part.crow.diff() for part in parts])
        return SparseRows(
            crow=F.pad(counts.cumsum(0), (1, 0)),
            col=torch.cat([part.col for part in parts]),
            value=torch.cat([part.value for part in parts]),
            n_cols=parts[0].n_cols,
            scale=_concat([part.scale for part in parts]),
            shift=_concat([part.shift for part in parts]),
            width=parts[0].width if len({part.width for part in parts}) == 1 else None,
        )

    def _row_sums(self, entries: Tensor) -> Tensor:
        """Sum each row's entries without waiting for the device (``unsafe`` skips a check that would wait)."""
        return torch.segment_reduce(entries, "sum", offsets=self.crow, unsafe=True)


def _fixed_width_layout(col: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return row starts, columns and values of rows of the same width, ``[rows, width]``."""
    rows, width = col.shape
    crow = torch.arange(0, rows * width + 1, width, device=col.device)
    return crow, col.reshape(-1), value.reshape(-1)


def _concat(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
