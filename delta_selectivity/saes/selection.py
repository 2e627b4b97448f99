"""Activation functions of SAEs, from pre-activations to sparse codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from delta_selectivity.saes.sparse_rows import SparseRows
from delta_selectivity.saes.topk import exact_topk


class Selection(Protocol):
    """The activation function of an SAE."""

    def __call__(self, pre_acts: Tensor) -> SparseRows:
        """Return the codes of pre-activations ``[rows, d_sae]``."""
        ...

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Selection:
        """Return the same function with its tensors on another device or in another dtype."""
        ...


@dataclass(frozen=True)
class TopK:
    """The k largest pre-activations of each row, negative ones set to zero (Gao et al. 2024, arXiv 2406.04093)."""

    k: int

    def __call__(self, pre_acts: Tensor) -> SparseRows:
        values, indices = exact_topk(pre_acts, self.k)
        return fixed_width(values, indices, n_cols=pre_acts.shape[1])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TopK:
        return self


@dataclass(frozen=True)
class GroupMax:
    """The largest pre-activation in each of k contiguous groups of latents, negative ones set to zero (sparsify)."""

    k: int

    def __call__(self, pre_acts: Tensor) -> SparseRows:
        n_cols = pre_acts.shape[1]
        values, within = pre_acts.unflatten(1, (self.k, -1)).max(dim=2)
        first_of_group = torch.arange(0, n_cols, n_cols // self.k, device=pre_acts.device)
        return fixed_width(values, within + first_of_group, n_cols)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> GroupMax:
        return self


@dataclass(frozen=True)
class Threshold:
    """Every pre-activation above its latent's threshold: JumpReLU (arXiv 2407.14435), or ReLU with zeros."""

    threshold: Tensor  # [d_sae], not negative

    def __call__(self, pre_acts: Tensor) -> SparseRows:
        crow, row, col = _layout_of(_above_or_nan(pre_acts, self.threshold))
        return SparseRows(crow, col, pre_acts[row, col].float(), n_cols=pre_acts.shape[1])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Threshold:
        return Threshold(self.threshold.to(device, dtype))


@dataclass(frozen=True)
class Gated:
    """Latents that fire where the gate is positive, with a separate magnitude (arXiv 2404.16014).

    Pre-activations are those of the gate; the magnitude is ``relu(gain * pre_act + offset)``.
    """

    gain: Tensor  # [d_sae]
    offset: Tensor  # [d_sae]

    def __call__(self, pre_acts: Tensor) -> SparseRows:
        crow, row, col = _layout_of(_above_or_nan(pre_acts, 0.0))
        magnitude = (pre_acts[row, col] * self.gain[col] + self.offset[col]).relu()
        return SparseRows(crow, col, magnitude.float(), n_cols=pre_acts.shape[1])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Gated:
        return Gated(self.gain.to(device, dtype), self.offset.to(device, dtype))


@dataclass(frozen=True)
class Dense:
    """No selection: every latent keeps its pre-activation, negative or not."""

    def __call__(self, pre_acts: Tensor) -> SparseRows:
        rows, d_sae = pre_acts.shape
        columns = torch.arange(d_sae, device=pre_acts.device).expand(rows, -1)
        return SparseRows.of_width(columns, pre_acts.float(), n_cols=d_sae)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Dense:
        return self


def nonzero_codes(dense: Tensor) -> SparseRows:
    """Return the non-zero entries of a small dense matrix ``[rows, d_sae]`` as codes."""
    crow, row, col = _layout_of(dense != 0)
    return SparseRows(crow, col, dense[row, col].float(), n_cols=dense.shape[1])


def fixed_width(values: Tensor, indices: Tensor, n_cols: int) -> SparseRows:
    """Return codes from values and latents ``[rows, k]``, with negative values set to zero."""
    return SparseRows.of_width(indices, values.relu().float(), n_cols)


def _above_or_nan(pre_acts: Tensor, threshold: Tensor | float) -> Tensor:
    """Return a mask: above the threshold, or NaN, which would otherwise look like an inactive latent."""
    return (pre_acts <= threshold).logical_not_()


def _layout_of(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return row starts ``[rows + 1]``, rows and columns ``[nnz]`` of the true entries of ``[rows, d_sae]``."""
    # Bisection finds the row starts: summing the mask takes five times as long as finding its entries.
    row, col = (place.contiguous() for place in mask.nonzero(as_tuple=True))
    crow = torch.searchsorted(row, torch.arange(len(mask) + 1, device=mask.device))
    return crow, row, col
