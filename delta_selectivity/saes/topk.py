"""Exact selection of the k largest entries of each row."""

from __future__ import annotations

import torch
from torch import Tensor

WIDE = 512
"""Number of latents from which the compiled kernels are used; with fewer, loading them takes longer than they save."""


def exact_topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of each row, unordered.

    Compared with ``torch.topk`` in `python -m benchmarks.bench_kernels`.

    Args:
        pre_acts: ``[rows, d_sae]``, contiguous.
        k: how many, at most d_sae.

    Returns:
        Values and int64 indices, both ``[rows, k]``. Ties are broken arbitrarily, as in ``torch.topk``. All values of a
        row that holds NaN may be NaN.
    """
    if pre_acts.device.type != "cpu" or pre_acts.dtype != torch.float32 or pre_acts.shape[1] < WIDE:
        values, indices = pre_acts.topk(k, dim=1, sorted=False)
        return values, indices
    from delta_selectivity.saes.row_kernels import k_largest  # imported here: loading takes a second

    values, indices = map(torch.from_numpy, k_largest(pre_acts.numpy(), k))
    return values, indices
