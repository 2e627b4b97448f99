"""One sparse autoencoder or transcoder, whatever format it came from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from delta_selectivity.saes.coders import Coder
from delta_selectivity.saes.input_norm import InputNorm, normalise
from delta_selectivity.saes.sparse_rows import SparseRows

CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}
"""At most this much memory for the ``[rows, d_sae]`` pre-activations of one chunk; other devices as cuda."""
LEAST_ROWS = 256
"""But so many rows at a time, where there are: with 32, reading 32768 latents' weights takes longer than using them."""


@dataclass(frozen=True)
class Sae:
    """Encodes activations of one hook point of one layer and reconstructs them; a transcoder, those of another."""

    name: str
    """Where it was found: the name its user typed, and the folder below it."""
    layer: int
    hookpoint: str
    """The place that it reconstructs, by a name of ``hookpoints``."""
    d_in: int
    """Width of what it reads."""
    d_sae: int
    k: int | None
    """Latents per activation, where the architecture fixes them."""
    architecture: str
    """``topk``, ``groupmax``, ``standard``, ``jumprelu``, ``gated``, or what SAE Lens calls it; ``topk transcoder``."""
    coder: Coder
    input_norm: InputNorm = "none"
    input_hookpoint: str | None = None
    """Where a transcoder reads; None for an autoencoder, which reads what it reconstructs."""
    width_out: int | None = None
    """Width of what it writes, if that is not ``d_in``."""
    promised_l0: float | None = None
    """Latents per activation according to its config, on average if ``k`` does not fix them."""

    def __repr__(self) -> str:
        place = f"{self.hookpoint} of layer {self.layer}"
        return f"<Sae {self.name}: {self.architecture}, {self.d_in} -> {self.d_sae} latents, {place}>"

    @property
    def d_out(self) -> int:
        """Width of what it writes: of activations at ``hookpoint``."""
        return self.d_in if self.width_out is None else self.width_out

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
        """Codes of activations ``[rows, d_in]``, in chunks of rows that bound the memory.

        A transcoder's carry no way back from the normalisation: its output is of another place.
        """
        x, scale, shift = normalise(x.to(self.device, torch.float32), self.input_norm)
        chunks = x.to(self.dtype).split(self.chunk_rows())
        codes = SparseRows.concat([self.coder.encode(chunk) for chunk in chunks])
        return codes if self.input_hookpoint is not None else replace(codes, scale=scale, shift=shift)

    @torch.no_grad()
    def decode(self, codes: SparseRows, x: Tensor | None = None) -> Tensor:
        """Reconstructions of codes that this SAE's ``encode`` gave of x. float32 ``[rows, d_out]``.

        x ``[rows, d_in]`` is of use only to a decoder with a skip connection, which cannot do without it.
        """
        recon = self.coder.decode(codes, x)
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
        return max(LEAST_ROWS, budget // (self.d_sae * self.dtype.itemsize))
