"""Fast TopK encoding on a CPU: int8 products propose latents, float32 decides.

A product of signed bytes takes a fraction of one in float32 on CPUs that have instructions for it
(`python benchmarks/bench_kernels.py`), and is exact. What is lost is lost before: with y on a grid of 255 steps as ŷ,
and weights w as ŵ, Cauchy-Schwarz gives |y·w - ŷ·ŵ| <= ‖y - ŷ‖ ‖w‖ + ‖ŷ‖ ‖w - ŵ‖. So for each latent there is a largest
pre-activation that it may have. The k for which that is largest are computed in float32, then the others for which it
reaches the k-th of these: rarely more than 2 k in all. The k largest of what was computed are taken (`row_kernels`):
the latents are those of float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from delta_selectivity.system.gemm import byte_products
from delta_selectivity.system.processor import has_fast_bytes

LARGEST_STEP = 127
LARGEST_D_IN = 2**16  # sums of so many products of steps are whole numbers of 32 bits
PRODUCT_BYTES = 2 * 2**20  # what a core's cache holds
LEAST_ROWS = 256  # with fewer a product reads the weights longer than it multiplies
BLOCK = 4096  # latents at a time, for the memory of their copies


def is_worth_it(W_enc: Tensor, k: int) -> bool:
    """Whether a proposal saves time: enough latents, few of them chosen, a CPU for it.

    Times: `python benchmarks/bench_kernels.py`.
    """
    wide = len(W_enc) >= max(512, 32 * k) and W_enc.shape[1] <= LARGEST_D_IN
    return wide and W_enc.device.type == "cpu" and W_enc.dtype == torch.float32 and has_fast_bytes()


@dataclass(frozen=True)
class Proposal:
    """The encoder of a TopK SAE in steps of a grid, with what bounds its error."""

    W_enc: Tensor
    """float32 ``[d_sae, d_in]``."""
    b_enc: Tensor
    """float32 ``[d_sae]``."""
    centre: Tensor
    """What is taken off inputs before they are rounded: near their mean, it makes the bound small. ``[d_in]``."""
    column: Tensor
    """What inputs are then multiplied by, and weights divided by: no column of weights is small then. ``[d_in]``."""
    steps: Tensor
    """Weights on the grid. int8 ``[d_sae, d_in]``."""
    facts: Tensor
    """Of each latent its step, pre-activation of ``centre``, norm, and norm of what it lost. float32 ``[4, d_sae]``."""
    norm: float
    """Largest ‖w‖ of a latent."""
    k: int

    @classmethod
    def of(cls, W_enc: Tensor, b_enc: Tensor, centre: Tensor, k: int) -> Proposal:
        """The proposal of an encoder for inputs around ``centre``."""
        column = W_enc.norm(dim=0)
        column = torch.where(column == 0, 1, column)
        steps, facts = [], []
        for W, b in zip(W_enc.split(BLOCK), b_enc.split(BLOCK), strict=True):
            scaled = W / column
            step = scaled.abs().amax(dim=1) / LARGEST_STEP
            rounded = (scaled / torch.where(step == 0, 1, step)[:, None]).round()
            lost = (scaled - rounded * step[:, None]).norm(dim=1)
            at_centre = W.double() @ centre.double() + b.double()
            steps.append(rounded.to(torch.int8))
            facts.append(torch.stack([step, at_centre.float(), scaled.norm(dim=1), lost]))
        norm = float(W_enc.norm(dim=1).max())
        return cls(W_enc, b_enc, centre, column, torch.cat(steps), torch.cat(facts, dim=1), norm, k)

    def topk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The k largest pre-activations of x ``[rows, d_in]`` and their latents, in no order: both ``[rows, k]``.

        The latents are those of float32. Values are float32 sums in another order than a matrix product's, and equal to
        1e-6 of what is summed. A row with NaN or Inf in it has NaN for values.
        """
        from delta_selectivity.saes.row_kernels import (
            k_largest_of_proposed,
            quantise,
        )  # here: they take a while to load

        rows, W_enc, b_enc, facts = (t.contiguous().numpy() for t in (x, self.W_enc, self.b_enc, self.facts))
        steps, inputs = quantise(rows, self.centre.numpy(), self.column.numpy(), self.norm)
        n, k = len(rows), self.k
        values, latents = np.empty(n * k + 1, np.float32), np.empty(n * k + 1, np.int64)
        for start in range(0, n, self.rows_at_once):
            some = slice(start, start + self.rows_at_once)
            taken = slice(start * k, min(start + self.rows_at_once, n) * k + 1)
            proposed = byte_products(torch.from_numpy(steps[some]), self.steps)
            k_largest_of_proposed(
                proposed, inputs[some], facts, rows[some], W_enc, b_enc, k, values[taken], latents[taken]
            )
        return torch.from_numpy(values[:-1].reshape(n, k)), torch.from_numpy(latents[:-1].reshape(n, k))

    @property
    def rows_at_once(self) -> int:
        """Rows whose products stay in the cache until they are looked through, but enough for a fast product."""
        return max(LEAST_ROWS, PRODUCT_BYTES // (4 * len(self.W_enc)))
