"""One sparse autoencoder, whatever format it came from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sae_formats.coders import Coder
from sae_formats.input_norm import InputNorm, normalise
from sae_formats.sparse_rows import SparseRows

CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 512 * 2**20}
"""At most this much memory for the ``[rows, d_sae]`` pre-activations of one chunk; other devices as cuda."""


@dataclass(frozen=True)
class Sae:
    """Encodes and reconstructs the activations of one hook point of one layer."""

    name: str
    """Where it was found: the name its user typed, and the folder below it."""
    layer: int
    hookpoint: str
    """``resid_post``, ``mlp_out``, ``attn_out``, or a module path with ``<layer>``."""
    d_in: int
    d_sae: int
    k: int | None
    """Latents per activation, where the architecture fixes them."""
    architecture: str
    """``topk``, ``groupmax``, ``standard``, ``jumprelu``, ``gated``, or what SAE Lens calls it."""
    coder: Coder
    input_norm: InputNorm = "none"

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where ``encode`` computes."""
        return self.coder.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are computed in. Codes and reconstructions are float32 all the same."""
        return self.coder.dtype

    @torch.no_grad()
    def encode(self, x: Tensor) -> SparseRows:
        """Codes of activations ``[rows, d_in]``, in chunks of rows that bound the memory."""
        x, scale, shift = normalise(x.to(self.device, torch.float32), self.input_norm)
        chunks = x.to(self.dtype).split(self.chunk_rows())
        codes = SparseRows.concat([self.coder.encode(chunk) for chunk in chunks])
        return replace(codes, scale=scale, shift=shift)

    @torch.no_grad()
    def decode(self, codes: SparseRows) -> Tensor:
        """Reconstructions of codes that this SAE's ``encode`` gave. float32 ``[rows, d_in]``."""
        recon = self.coder.decode(codes)
        if codes.scale is not None:
            recon = recon * codes.scale.unsqueeze(1)
        if codes.shift is not None:
            recon = recon + codes.shift.unsqueeze(1)
        return recon

    def to(self, device: torch.device | str) -> Sae:
        """The same SAE on another device."""
        return replace(self, coder=self.coder.to(device))

    def chunk_rows(self) -> int:
        """How many rows ``encode`` takes at a time."""
        budget = CHUNK_BYTES.get(self.device.type, CHUNK_BYTES["cuda"])
        return max(1, budget // (self.d_sae * self.dtype.itemsize))
