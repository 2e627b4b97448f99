"""Coders for baselines: identity, constant, random TopK, principal components, shuffled decoder.

They share the interface of SAE coders. The caller computes the means and axes that they use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from delta_selectivity.saes.coders import DecoderWrapper, LinearCoder, fold_b_dec
from delta_selectivity.saes.selection import Dense, Threshold, TopK
from delta_selectivity.saes.sparse_rows import SparseRows


@dataclass(frozen=True)
class IdentityCoder:
    """The identity, z = x and x̂ = z, exact to the bit."""

    d_in: int
    device: torch.device
    dtype = torch.float32

    def encode(self, x: Tensor) -> SparseRows:
        return Dense()(x)

    def decode(self, codes: SparseRows, x: Tensor | None = None) -> Tensor:
        return codes.value.view(codes.n_rows, self.d_in)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> IdentityCoder:
        return IdentityCoder(self.d_in, torch.device(device))


@dataclass(frozen=True)
class ShuffledDecoder(DecoderWrapper):
    """A coder that decodes the codes with permuted decoder rows; the biases are unchanged.

    Latent j is decoded as latent ``permutation[j]``. This equals permuting the decoder's rows, works for every
    architecture, and shares the weights with the original coder.
    """

    permutation: Tensor  # int64 [d_sae], of the latents

    def decode(self, codes: SparseRows, x: Tensor | None = None) -> Tensor:
        return self.coder.decode(replace(codes, col=self.permutation[codes.col.long()]), x)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ShuffledDecoder:
        return ShuffledDecoder(self.coder.to(device, dtype), self.permutation.to(device))


def constant(mean: Tensor) -> LinearCoder:
    """Return a coder that reconstructs every x as ``mean [d_in]``, with one latent that never fires."""
    zeros = torch.zeros(1, len(mean), dtype=torch.float32, device=mean.device)
    never_fires = Threshold(torch.full((1,), torch.inf, dtype=torch.float32, device=mean.device))
    return LinearCoder(zeros, zeros[:, 0], zeros, mean.float(), never_fires)


def principal_components(axes: Tensor, mean: Tensor) -> LinearCoder:
    """Return the coder that projects x - mean onto orthonormal axes ``[k, d_in]``; its codes are the k scores."""
    axes, mean = axes.float(), mean.float()
    bias = fold_b_dec(axes, torch.zeros(len(axes), dtype=torch.float32, device=axes.device), mean)
    return LinearCoder(axes, bias, axes, mean, Dense())


def random_topk(mean: Tensor, d_sae: int, k: int, generator: torch.Generator) -> LinearCoder:
    """Return a TopK coder with random unit directions around ``mean [d_in]`` as encoder and decoder.

    The directions are drawn on the CPU, so they are the same for every device.
    """
    directions = torch.randn(d_sae, len(mean), generator=generator, dtype=torch.float32)
    directions = torch.nn.functional.normalize(directions, dim=1).to(mean.device)
    mean = mean.float()
    bias = fold_b_dec(directions, torch.zeros(d_sae, dtype=torch.float32, device=mean.device), mean)
    return LinearCoder(directions, bias, directions, mean, TopK(k))
