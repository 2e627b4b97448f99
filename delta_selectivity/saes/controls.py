"""Untrained coders for comparison: identity, constant, random TopK, principal components, shuffled decoder.

Each is what the rest of the program takes for an SAE's; none knows where its mean or its axes come from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from delta_selectivity.saes.coders import LinearCoder, OtherDecoder, fold_b_dec
from delta_selectivity.saes.selection import Dense, Threshold, TopK
from delta_selectivity.saes.sparse_rows import SparseRows


@dataclass(frozen=True)
class IdentityCoder:
    """z = x, x̂ = z, bit for bit: nothing is computed, and float32 is never rounded."""

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
class ShuffledDecoder(OtherDecoder):
    """A coder's own codes, decoded by rows of its decoder that belong to other latents; biases stay.

    Latent j decodes as latent ``other[j]``: that is a decoder with permuted rows, of whatever architecture, and
    shares its weights.
    """

    other: Tensor
    """A permutation of the latents. int64 ``[d_sae]``."""

    def decode(self, codes: SparseRows, x: Tensor | None = None) -> Tensor:
        return self.coder.decode(replace(codes, col=self.other[codes.col.long()]), x)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ShuffledDecoder:
        return ShuffledDecoder(self.coder.to(device, dtype), self.other.to(device))


def constant(mean: Tensor) -> LinearCoder:
    """x̂ = mean ``[d_in]``, whatever x: a dictionary of one latent that never fires."""
    silent = torch.zeros(1, len(mean), dtype=torch.float32, device=mean.device)
    never = Threshold(torch.full((1,), torch.inf, dtype=torch.float32, device=mean.device))
    return LinearCoder(silent, silent[:, 0], silent, mean.float(), never)


def principal_components(axes: Tensor, mean: Tensor) -> LinearCoder:
    """x̂ = mean + the part of x - mean that lies along orthonormal axes ``[k, d_in]``; codes are the k scores."""
    axes, mean = axes.float(), mean.float()
    bias = fold_b_dec(axes, torch.zeros(len(axes), dtype=torch.float32, device=axes.device), mean)
    return LinearCoder(axes, bias, axes, mean, Dense())


def random_topk(mean: Tensor, d_sae: int, k: int, generator: torch.Generator) -> LinearCoder:
    """TopK on random unit directions around a mean ``[d_in]``, decoded by the same directions.

    Directions are drawn on the CPU, so that every device has the same.
    """
    directions = torch.randn(d_sae, len(mean), generator=generator, dtype=torch.float32)
    directions = torch.nn.functional.normalize(directions, dim=1).to(mean.device)
    mean = mean.float()
    bias = fold_b_dec(directions, torch.zeros(d_sae, dtype=torch.float32, device=mean.device), mean)
    return LinearCoder(directions, bias, directions, mean, TopK(k))
