"""Exact k largest entries of each row."""

from __future__ import annotations

import torch
from torch import Tensor

WIDE = 512
"""Latents from which on the kernels are used: for fewer it takes longer to load them than they save."""


def exact_topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, in no particular order.

    Beside ``torch.topk``: `python benchmarks/bench_kernels.py`.

    Args:
        pre_acts: ``[rows, d_sae]``, contiguous.
        k: how many, at most d_sae.

    Returns:
        values and int64 indices, both ``[rows, k]``. Among equal values any choice is possible, as in ``torch.topk``;
        of a row with NaN in it all values may be NaN.
    """
    if pre_acts.device.type != "cpu" or pre_acts.dtype != torch.float32 or pre_acts.shape[1] < WIDE:
        values, indices = pre_acts.topk(k, dim=1, sorted=False)
        return values, indices
    from delta_selectivity.saes.row_kernels import k_largest  # here: it takes a second to load

    values, indices = map(torch.from_numpy, k_largest(pre_acts.numpy(), k))
    return values, indices
