"""TopK codes in half the encoder's time: bfloat16 proposes latents, float32 decides among them.

A bfloat16 product of the encoder is three times as fast as one in float32 on CPUs that have instructions for it. Its
error is bounded: for inputs y and weights w with roundings ŷ and ŵ, Cauchy-Schwarz gives
|y·w - ŷ·ŵ| <= ‖y - ŷ‖ ‖w‖ + ‖ŷ‖ ‖w - ŵ‖. The m > k latents with the largest proposed pre-activations hold the k truly
largest where the k-th of them is above the last by twice that bound. Those m are computed again in float32, and the k
largest taken. Rows where nothing is proven are tried with a larger m, and then encoded in float32 as a whole: the
latents are those of float32 either way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_formats.topk import exact_topk

PROPOSED = (3, 16)
"""How many latents are proposed, as multiples of k; the second where the first prove nothing."""
ROUND_OUT = 2.0**-8
"""Largest relative error of a float32 number that is rounded to bfloat16."""
ROUND_SUM = 2.0**-23
"""Of one float32 addition or product, twice: one for the proposal and one for what it is compared with."""


def is_worth_it(W_enc: Tensor, k: int) -> bool:
    """Whether a proposal would save a tenth of the encoder's time or more: many latents, few chosen, a CPU for it.

    One thread, in milliseconds, float32 and proposal:

    =============  =====  ===  =======  ========
    rows x d_in    d_sae    k  float32  proposal
    =============  =====  ===  =======  ========
    256 x 768      32768   32      198       110
    256 x 768      32768   64      177       111
    128 x 768      32768  128      104        73
    128 x 1024     65536   32      286       162
    256 x 512       8192   32       32        24
    1024 x 256      1024    8        9        10
    =============  =====  ===  =======  ========
    """
    wide = len(W_enc) >= max(8192, 256 * k)
    return wide and W_enc.device.type == "cpu" and W_enc.dtype == torch.float32 and _has_fast_bfloat16()


@cache
def _has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


@dataclass(frozen=True)
class Proposal:
    """The encoder of a TopK SAE in bfloat16, with what bounds its error."""

    W_enc: Tensor
    """float32 ``[d_sae, d_in]``."""
    b_enc: Tensor
    """float32 ``[d_sae]``."""
    centre: Tensor
    """What is taken off inputs before they are rounded: near their mean, it makes the bound small. ``[d_in]``."""
    W_half: Tensor
    """bfloat16 ``[d_sae, d_in]``."""
    b_half: Tensor
    """Pre-activations of ``centre``. bfloat16 ``[d_sae]``."""
    norm: float
    """Largest ‖w‖ of a latent."""
    rounding: float
    """Largest ‖w - ŵ‖ of a latent."""
    offset: float
    """Largest rounding error of ``b_half``."""
    k: int

    @classmethod
    def of(cls, W_enc: Tensor, b_enc: Tensor, centre: Tensor, k: int) -> Proposal:
        """The proposal of an encoder for inputs around ``centre``."""
        W_half = W_enc.bfloat16()
        bias = torch.cat([block.double() @ centre.double() for block in W_enc.split(4096)]) + b_enc.double()
        b_half = bias.bfloat16()
        return cls(
            W_enc=W_enc,
            b_enc=b_enc,
            centre=centre,
            W_half=W_half,
            b_half=b_half,
            norm=float(W_enc.norm(dim=1).max()),
            rounding=_largest_rounding(W_enc, W_half),
            offset=float((bias - b_half.double()).abs().max()),
            k=k,
        )

    def topk(self, x: Tensor, pre_acts: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The k largest pre-activations of x ``[rows, d_in]`` and their latents, in no order: both ``[rows, k]``.

        The latents are those of float32. Values are float32 sums in another order than a matrix product's, and equal to
        1e-6 of what is summed. `pre_acts` is the plain way, for rows where nothing is proven.
        """
        proposed, bound = self._propose(x)
        values, latents = x.new_empty(len(x), self.k), torch.empty(len(x), self.k, dtype=torch.int64)
        left = torch.arange(len(x))
        for multiple in PROPOSED:
            found, candidates = exact_topk(proposed, multiple * self.k)
            proven = _proves(found.float(), self.k, bound)
            rows = left[proven]
            values[rows], latents[rows] = self._decide(x[rows], candidates[proven])
            left, proposed, bound = left[~proven], proposed[~proven], bound[~proven]
            if len(left) == 0:
                return values, latents
        values[left], latents[left] = exact_topk(pre_acts(x[left]), self.k)
        return values, latents

    def _propose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """bfloat16 pre-activations ``[rows, d_sae]``, and what they are off by at most before rounding, ``[rows]``."""
        y = x - self.centre
        y_half = y.bfloat16()
        sizes = (x.norm(dim=1) + self.centre.norm() + y.norm(dim=1)) * self.norm
        bound = (y - y_half.float()).norm(dim=1) * self.norm + y_half.float().norm(dim=1) * self.rounding
        bound = bound + self.offset + ROUND_SUM * x.shape[1] * sizes
        return F.linear(y_half, self.W_half, self.b_half), bound

    def _decide(self, x: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """The k largest of the candidates ``[rows, m]`` by their float32 pre-activations."""
        rows, m = candidates.shape
        latents = candidates.reshape(-1)
        starts = torch.arange(0, rows * m + 1, m)
        shape = (rows, len(self.W_enc))
        biases = torch.sparse_csr_tensor(starts, latents, self.b_enc[latents], shape, check_invariants=False)
        pre_acts = torch.sparse.sampled_addmm(biases, x, self.W_enc.T).values().view(rows, m)
        values, chosen = pre_acts.topk(self.k, dim=1, sorted=False)
        return values, candidates.gather(1, chosen)


def _proves(proposed: Tensor, k: int, bound: Tensor) -> Tensor:
    """Whether the k truly largest are among these largest proposals ``[rows, m]``; bool ``[rows]``, False for NaN."""
    kth, last = proposed.topk(k, dim=1, sorted=False).values.amin(dim=1), proposed.amin(dim=1)
    return (kth - ROUND_OUT * kth.abs()) - (last + ROUND_OUT * last.abs()) > 2 * bound


def _largest_rounding(W: Tensor, W_half: Tensor) -> float:
    """Of a row, as a Euclidean norm; a block of rows at a time, for their memory."""
    blocks = zip(W.split(4096), W_half.split(4096), strict=True)
    return max(float((w - w_half.float()).norm(dim=1).max()) for w, w_half in blocks)
