"""TopK codes in half the encoder's time: bfloat16 proposes latents, float32 decides among them.

A bfloat16 product of the encoder is two to three times as fast as one in float32 on CPUs that have instructions for
it. Its error is bounded: for inputs y and weights w with roundings ŷ and ŵ, Cauchy-Schwarz gives
|y·w - ŷ·ŵ| <= ‖y - ŷ‖ ‖w‖ + ‖ŷ‖ ‖w - ŵ‖. So the k truly largest are among the latents whose proposal is no more than
twice that below the k-th largest proposal. Those, rarely more than 1.5 k, are computed in float32 and the k largest
taken (`row_kernels`): the latents are those of float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gemm import has_fast_bfloat16


def is_worth_it(W_enc: Tensor, k: int) -> bool:
    """Whether a proposal saves time: enough latents, few of them chosen, a CPU for it.

    Times: `python benchmarks/bench_kernels.py`.
    """
    wide = len(W_enc) >= max(1024, 32 * k)
    return wide and W_enc.device.type == "cpu" and W_enc.dtype == torch.float32 and has_fast_bfloat16()


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

    def topk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The k largest pre-activations of x ``[rows, d_in]`` and their latents, in no order: both ``[rows, k]``.

        The latents are those of float32. Values are float32 sums in another order than a matrix product's, and equal to
        1e-6 of what is summed. A row with NaN or Inf in it has NaN for values.
        """
        from sae_formats.row_kernels import k_largest_of_proposed  # here: it takes a second to load

        x = x.contiguous()
        proposed, off = self.propose(x)
        bits = proposed.view(torch.int16).numpy()  # Numba knows no bfloat16
        values, latents = k_largest_of_proposed(bits, off, x.numpy(), self.W_enc.numpy(), self.b_enc.numpy(), self.k)
        return torch.from_numpy(values), torch.from_numpy(latents)

    def propose(self, x: Tensor) -> tuple[Tensor, NDArray[np.float32]]:
        """bfloat16 pre-activations ``[rows, d_sae]``, and what they are off by at most before rounding, ``[rows]``."""
        from sae_formats.row_kernels import round_inputs

        halves, off = round_inputs(x.numpy(), self.centre.numpy(), self.norm, self.rounding, self.offset)
        return F.linear(torch.from_numpy(halves).view(torch.bfloat16), self.W_half, self.b_half), off


def _largest_rounding(W: Tensor, W_half: Tensor) -> float:
    """Of a row, as a Euclidean norm; a block of rows at a time, for their memory."""
    blocks = zip(W.split(4096), W_half.split(4096), strict=True)
    return max(float((w - w_half.float()).norm(dim=1).max()) for w, w_half in blocks)
