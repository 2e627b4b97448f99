"""The k largest entries of each row, exactly, and faster than ``torch.topk`` on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 8
"""Latents in a group of the two-stage search. 8 and 16 were the fastest of 4, 8, 16, 32; 8 wins for k >= 32."""

WORTH_IT = 16
"""The two-stage search is used from ``d_sae >= WORTH_IT * k``. One thread, 1024 rows (128 at 32768), milliseconds:

======  ====  ===========  =========
d_sae      k  torch.topk   two-stage
======  ====  ===========  =========
  1024     8         2.6        2.3
  1024    32         9.1        4.7
  1024    64        13.6       12.2
  1024   128        14.8       27.6
  4096    32        18.4       11.1
 32768     8         5.3        1.4
 32768    32         6.6        2.7
 32768   256        26.6       10.6
======  ====  ===========  =========
"""


def exact_topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, in no particular order.

    Args:
        pre_acts: ``[rows, d_sae]``, contiguous.
        k: how many, at most d_sae.

    Returns:
        values and int64 indices, both ``[rows, k]``. Among equal values any choice is possible, as in ``torch.topk``.
    """
    d_sae = pre_acts.shape[1]
    on_cpu = pre_acts.device.type == "cpu"
    if on_cpu and d_sae % GROUP == 0 and d_sae >= WORTH_IT * k:
        return two_stage_topk(pre_acts, k)
    values, indices = pre_acts.topk(k, dim=1, sorted=False)
    return values, indices


def two_stage_topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As ``exact_topk``: the k groups with the largest maxima, then the k largest of their members.

    Exact, because an entry outside these groups is at most its group's maximum, and the k chosen maxima, entries
    themselves, are at least that. d_sae must be a multiple of GROUP and at least ``GROUP * k``.
    """
    rows, d_sae = pre_acts.shape
    n_groups = d_sae // GROUP
    # Group g holds latents g, g + n_groups, ...: the maximum then runs along contiguous memory.
    group_max = pre_acts.view(rows, GROUP, n_groups).amax(dim=1)
    groups = group_max.topk(k, dim=1, sorted=False).indices
    member_offsets = torch.arange(0, d_sae, n_groups, device=pre_acts.device)
    candidates = (groups.unsqueeze(1) + member_offsets.view(1, GROUP, 1)).view(rows, GROUP * k)
    values, chosen = pre_acts.gather(1, candidates).topk(k, dim=1, sorted=False)
    return values, candidates.gather(1, chosen)
