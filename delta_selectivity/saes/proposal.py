"""Fast TopK encoding on a CPU: int8 products propose candidate latents, float32 products select among them.

On CPUs with int8 instructions an int8 product takes a fraction of the time of a float32 one (`python
benchmarks/bench_kernels.py`) and is itself exact; only the quantisation of its factors loses precision. For an input y
and weights w, quantised to ŷ and ŵ with 255 steps, Cauchy-Schwarz gives |y·w - ŷ·ŵ| <= ‖y - ŷ‖ ‖w‖ + ‖ŷ‖ ‖w - ŵ‖. This
bounds each pre-activation from above. The k latents with the largest bounds are computed in float32, then all others
whose bound reaches the k-th of these values, rarely more than 2 k in all. The k largest of the computed values are
returned (`row_kernels`), so the latents are those that float32 selects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from delta_selectivity.system.gemm import byte_products
from delta_selectivity.system.processor import has_fast_bytes

LARGEST_STEP = 127
LARGEST_D_IN = 2**16  # int32 holds the sum of this many int8 products
PRODUCT_BYTES = 2 * 2**20  # size of a core's cache
MIN_ROWS = 256  # with fewer rows, reading the weights dominates the product
BLOCK = 4096  # latents at a time, to limit the memory of copies


def saves_time(W_enc: Tensor, k: int) -> bool:
    """Return whether a proposal saves time: many latents, a small k, and a CPU with int8 instructions.

    Timings: `python -m benchmarks.bench_kernels`.
    """
    wide = len(W_enc) >= max(512, 32 * k) and W_enc.shape[1] <= LARGEST_D_IN
    return wide and W_enc.device.type == "cpu" and W_enc.dtype == torch.float32 and has_fast_bytes()


@dataclass(frozen=True)
class Proposal:
    """The quantised encoder of a TopK SAE, with what is needed to bound its error."""

    W_enc: Tensor  # float32 [d_sae, d_in]
    b_enc: Tensor  # float32 [d_sae]
    centre: Tensor  # [d_in], subtracted from inputs before quantisation; close to their mean, it makes the bound tight
    column: Tensor  # [d_in], column norms of W_enc: before rounding, inputs are multiplied and weights divided by them
    steps: Tensor  # int8 [d_sae, d_in], the quantised weights
    facts: Tensor  # float32 [4, d_sae], per latent: step, pre-activation of `centre`, norm, norm of the rounding error
    norm: float  # largest ‖w‖ of any latent
    k: int

    @classmethod
    def of(cls, W_enc: Tensor, b_enc: Tensor, centre: Tensor, k: int) -> Proposal:
        """Quantise an encoder for inputs close to ``centre``."""
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
        """Return the k largest pre-activations of x ``[rows, d_in]`` and their latents, unordered, both ``[rows, k]``.

        The latents are those that float32 selects. Values are float32 sums in another order than a matrix product's,
        equal within 1e-6 of the summands' size. A row with NaN or Inf has NaN values.
        """
        from delta_selectivity.saes.row_kernels import (
            k_largest_of_proposed,
            quantise,
        )  # lazily: loading compiled kernels is slow

        rows, W_enc, b_enc, facts = (t.contiguous().numpy() for t in (x, self.W_enc, self.b_enc, self.facts))
        steps, inputs = quantise(rows, self.centre.numpy(), self.column.numpy(), self.norm)
        n, k = len(rows), self.k
        values, latents = np.empty(n * k + 1, np.float32), np.empty(n * k + 1, np.int64)
        for start in range(0, n, self.rows_at_once):
            chunk = slice(start, start + self.rows_at_once)
            outputs = slice(start * k, min(start + self.rows_at_once, n) * k + 1)
            proposed = byte_products(torch.from_numpy(steps[chunk]), self.steps)
            k_largest_of_proposed(
                proposed, inputs[chunk], facts, rows[chunk], W_enc, b_enc, k, values[outputs], latents[outputs]
            )
        return torch.from_numpy(values[:-1].reshape(n, k)), torch.from_numpy(latents[:-1].reshape(n, k))

    @property
    def rows_at_once(self) -> int:
        """Rows per product: few enough for the products to stay in the cache, enough for fast products."""
        return max(MIN_ROWS, PRODUCT_BYTES // (4 * len(self.W_enc)))
