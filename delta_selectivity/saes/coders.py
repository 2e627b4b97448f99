"""Encoders and decoders of SAEs, without input normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from delta_selectivity.saes.proposal import Proposal, saves_time
from delta_selectivity.saes.selection import Selection, TopK, fixed_width
from delta_selectivity.saes.sparse_rows import SparseRows
from delta_selectivity.system.gemm import linear


class Coder(Protocol):
    """An SAE's encoder and decoder, without input normalisation or chunking."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        ...

    def encode(self, x: Tensor) -> SparseRows:
        """Encode ``[rows, d_in]``, given in the coder's dtype and on its device."""
        ...

    def decode(self, codes: SparseRows, x: Tensor | None = None) -> Tensor:
        """Return float32 reconstructions ``[rows, d_out]``; skip connections also read the encoder's input ``x``."""
        ...

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Coder:
        """Return the coder on another device, optionally in another dtype."""
        ...


@dataclass(frozen=True)
class LinearCoder:
    """Linear encoder and decoder: z = selection(x W_encᵀ + b_enc), x̂ = Σ_j z_j W_dec[j] + b_dec."""

    W_enc: Tensor  # [d_sae, d_in]
    b_enc: Tensor  # [d_sae]; includes the decoder bias if the format subtracts it from the input (`fold_b_dec`)
    W_dec: Tensor  # [d_sae, d_out]
    b_dec: Tensor  # [d_out]
    selection: Selection

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc.dtype

    def encode(self, x: Tensor) -> SparseRows:
        if self._proposal is None:
            return self.selection(linear(x, self.W_enc, self.b_enc))
        values, latents = self._proposal.topk(x)
        return fixed_width(values, latents, n_cols=len(self.W_enc))

    @cached_property
    def _proposal(self) -> Proposal | None:
        """A faster encoder that returns the same codes, where one exists."""
        if not isinstance(self.selection, TopK) or not saves_time(self.W_enc, self.selection.k):
            return None
        same_width = self.b_dec.shape[0] == self.W_enc.shape[1]
        centre = self.b_dec if same_width else self.b_dec.new_zeros(self.W_enc.shape[1])
        return Proposal.of(self.W_enc, self.b_enc, centre, self.selection.k)

    def decode(self, codes: SparseRows, x: Tensor | None = None) -> Tensor:
        recon = F.embedding_bag(
            codes.col.to(codes.crow.dtype),
            self.W_dec,
            codes.crow,
            mode="sum",
            per_sample_weights=codes.value.to(self.dtype),
            include_last_offset=True,
        )
        return recon.float().add_(self.b_dec.float())

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LinearCoder:
        return LinearCoder(
            W_enc=self.W_enc.to(device, dtype),
            b_enc=self.b_enc.to(device, dtype),
            W_dec=self.W_dec.to(device, dtype),
            b_dec=self.b_dec.to(device, dtype),
            selection=self.selection.to(device, dtype),
        )


@dataclass(frozen=True)
class DecoderWrapper:
    """Base class of coders with the encoder of another coder and a different decoder."""

    coder: Coder

    @property
    def device(self) -> torch.device:
        return self.coder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.coder.dtype

    def encode(self, x: Tensor) -> SparseRows:
        return self.coder.encode(x)


@dataclass(frozen=True)
class SkipCoder(DecoderWrapper):
    """A coder with a skip connection: x̂ = coder.decode(codes) + x W_skipᵀ (arXiv 2501.18823)."""

    W_skip: Tensor  # [d_out, d_in]

    def decode(self, codes: SparseRows, x: Tensor | None = None) -> Tensor:
        assert x is not None, "a skip connection needs the encoder's input: decode(codes, x)"
        return self.coder.decode(codes, x) + F.linear(x.to(self.device, self.dtype), self.W_skip).float()

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> SkipCoder:
        return SkipCoder(self.coder.to(device, dtype), self.W_skip.to(device, dtype))


def fold_b_dec(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """Return the bias ``[d_sae]`` for which ``x W_encᵀ + bias`` equals ``(x - b_dec) W_encᵀ + b_enc``.

    Computed in float64, because b_dec holds the activations' mean, which can be 1000 times their spread. Latents are
    processed in blocks, because a float64 copy of a wide encoder may not fit into memory.
    """
    b_dec = b_dec.double()
    shift = torch.cat([block.double() @ b_dec for block in W_enc.split(4096)])
    return (b_enc.double() - shift).to(b_enc.dtype)
