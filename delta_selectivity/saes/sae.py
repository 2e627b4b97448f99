"""A sparse autoencoder or transcoder, independent of its file format."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from delta_selectivity.saes.coders import Coder
from delta_selectivity.saes.input_norm import InputNorm, normalise
from delta_selectivity.saes.sparse_rows import SparseRows

CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}
"""Memory limit for the ``[rows, d_sae]`` pre-activations of one chunk; other devices use the limit of cuda."""
MIN_ROWS = 256
"""Minimum rows per chunk: with 32 rows and 32768 latents, reading the weights takes longer than multiplying."""


@dataclass(frozen=True)
class Sae:
    """An SAE for one hook point of one layer; a transcoder encodes one hook point and reconstructs another."""

    name: str  # the name that the user typed, and the subfolder
    layer: int
    hookpoint: str  # the hook point that it reconstructs, by a name of `hookpoints`
    d_in: int  # width of its input
    d_sae: int
    k: int | None  # latents per activation, if the architecture fixes their number
    architecture: str  # `topk`, `groupmax`, `standard`, `jumprelu`, `gated`, or SAE Lens's name; `topk transcoder`
    coder: Coder
    input_norm: InputNorm = "none"
    input_hookpoint: str | None = None  # the hook point that a transcoder reads; None for an autoencoder
    width_out: int | None = None  # width of its output, if not `d_in`
    promised_l0: float | None = None  # latents per activation according to its config: `k`, or a mean

    def __repr__(self) -> str:
        place = f"{self.hookpoint} of layer {self.layer}"
        return f"<Sae {self.name}: {self.architecture}, {self.d_in} -> {self.d_sae} latents, {place}>"

    @property
    def d_out(self) -> int:
        """Width of its output, the activations at ``hookpoint``."""
        return self.d_in if self.width_out is None else self.width_out

    @property
    def device(self) -> torch.device:
        """Device of the weights and of ``encode``."""
        return self.coder.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights. Codes and reconstructions are always float32."""
        return self.coder.dtype

    @torch.no_grad()
    def encode(self, x: Tensor) -> SparseRows:
        """Encode activations, in chunks of rows that limit memory.

        Args:
            x: ``[rows, d_in]``, in any dtype and on any device.

        Returns:
            Codes of all rows, on the SAE's device. A transcoder's codes carry no scale and shift: its output is at
            another hook point, so the input normalisation is not inverted.
        """
        x, scale, shift = normalise(x.to(self.device, torch.float32), self.input_norm)
        chunks = x.to(self.dtype).split(self.chunk_rows())
        codes = SparseRows.concat([self.coder.encode(chunk) for chunk in chunks])
        return codes if self.input_hookpoint is not None else replace(codes, scale=scale, shift=shift)

    @torch.no_grad()
    def decode(self, codes: SparseRows, x: Tensor | None = None) -> Tensor:
        """Reconstruct activations from codes.

        Args:
            codes: what this SAE's ``encode`` returned for x.
            x: the encoded activations ``[rows, d_in]``; a decoder with a skip connection needs it, others ignore it.

        Returns:
            float32 ``[rows, d_out]``.
        """
        recon = self.coder.decode(codes, x)
        if codes.scale is not None:
            recon = recon * codes.scale.unsqueeze(1)
        if codes.shift is not None:
            recon = recon + codes.shift.unsqueeze(1)
        return recon

    def to(self, device: torch.device | str) -> Sae:
        """Return the same SAE on another device."""
        return replace(self, coder=self.coder.to(device))

    def chunk_rows(self) -> int:
        """Return how many rows ``encode`` processes at a time."""
        budget = CHUNK_BYTES.get(self.device.type, CHUNK_BYTES["cuda"])
        return max(MIN_ROWS, budget // (self.d_sae * self.dtype.itemsize))
