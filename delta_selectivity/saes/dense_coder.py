"""Wrap foreign ``encode`` and ``decode`` functions that work on dense codes.

Codes are made sparse as soon as they are returned, and dense again a few rows at a time, for their decoder alone.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.selection import nonzero_codes
from delta_selectivity.saes.sparse_rows import SparseRows

DENSE_ROWS = 256
"""Rows that are decoded at a time."""


class EncodesDensely(Protocol):
    """What others call an SAE. Each row stands for itself: batches are cut as memory allows."""

    def encode(self, x: Tensor, /) -> Tensor:
        """Activations ``[rows, d_in]`` to codes ``[rows, d_sae]``."""
        ...

    def decode(self, codes: Tensor, /) -> Tensor:
        """Codes ``[rows, d_sae]`` to reconstructions ``[rows, d_out]``."""
        ...


@dataclass(frozen=True)
class DenseCoder:
    """An object with dense ``encode`` and ``decode``. A module moves between devices; anything else stays at home."""

    sae: EncodesDensely
    d_out: int
    d_sae: int | None
    """Columns of its codes; None: not known yet."""
    home: torch.device
    """Where the object computes."""
    device: torch.device
    """Where codes and reconstructions are handed over."""
    dtype: torch.dtype
    """What the object computes in."""

    @classmethod
    def of(cls, sae: EncodesDensely, d_out: int, d_sae: int | None = None) -> DenseCoder:
        """Where the object's tensors are and in their dtype; on the CPU and in float32 if it is no module."""
        tensors: list[Tensor] = [*sae.parameters(), *sae.buffers()] if isinstance(sae, nn.Module) else []
        weights = (tensor for tensor in tensors if tensor.is_floating_point())
        weight = next(weights, torch.zeros(0, dtype=torch.float32, device="cpu"))
        return cls(sae, d_out, d_sae, weight.device, weight.device, weight.dtype)

    def encode(self, x: Tensor) -> SparseRows:
        with contained(self.sae, self.home):  # a copy: it may compute in place, and others read the same x
            codes = self.sae.encode(x.to(self.home, copy=True))
        return nonzero_codes(self._checked(codes, "encode", len(x), self.d_sae).to(self.device))

    def decode(self, codes: SparseRows, x: Tensor | None = None) -> Tensor:
        rows = torch.arange(codes.n_rows, device=codes.crow.device).repeat_interleave(codes.crow.diff())
        recon = torch.empty(codes.n_rows, self.d_out, dtype=torch.float32, device=self.device)
        for start in range(0, codes.n_rows, DENSE_ROWS):
            stop = min(start + DENSE_ROWS, codes.n_rows)
            entries = slice(int(codes.crow[start]), int(codes.crow[stop]))
            dense = torch.zeros(stop - start, codes.n_cols, dtype=self.dtype, device=self.device)
            dense[rows[entries] - start, codes.col[entries]] = codes.value[entries].to(self.dtype)
            with contained(self.sae, self.home):
                found = self.sae.decode(dense.to(self.home))
            recon[start:stop] = self._checked(found, "decode", stop - start, self.d_out)
        recon[rows[codes.value.isfinite().logical_not_()]] = torch.nan  # though it may ignore those latents
        return recon

    def _checked(self, found: Any, method: str, rows: int, width: int | None) -> Tensor:
        """Return what a method gave of so many rows. Raises `RequestError` for what is no matrix of that shape."""
        if problem := misshapen(found, rows, width):
            raise RequestError(f"`saes` {type(self.sae).__name__}: {method} of {rows} rows gives {problem}")
        return found

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> DenseCoder:
        device, dtype = torch.device(device), dtype or self.dtype
        if not isinstance(self.sae, nn.Module):
            return replace(self, device=device)
        if (device, dtype) == (self.home, self.dtype):
            return self
        moved: Any = copy.deepcopy(self.sae).to(device=device, dtype=dtype)
        return DenseCoder(moved, self.d_out, self.d_sae, device, device, dtype)


def misshapen(found: Any, rows: int, width: int | None = None) -> str | None:
    """Say what somebody else's code gave in place of real numbers ``[rows, width]``; None if it gave them."""
    needed = f"a dense tensor [{rows}, {'width' if width is None else width}] of real numbers is needed"
    if not isinstance(found, Tensor):
        return f"a {type(found).__name__}; {needed}"
    if found.layout != torch.strided:
        return f"a sparse tensor; {needed}"
    if found.is_complex():
        return f"complex numbers; {needed}"
    if found.dim() != 2 or len(found) != rows or width not in (None, found.shape[1]):
        return f"a tensor of shape {list(found.shape)}; {needed}"
    return None


class _Generators:
    """PyTorch's random number generators, held while somebody else's code runs in one thread or several.

    The first to enter keeps their states and seeds them, the last to leave puts the states back.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._states: list[tuple[torch.Generator, Tensor]] = []

    def enter(self, device: torch.device) -> None:
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            generators = [torch.random.default_generator]
            if device.type == "cuda":
                generators.append(torch.cuda.default_generators[device.index or 0])
            self._states = [(generator, generator.get_state()) for generator in generators]
            for generator in generators:
                generator.manual_seed(0)

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for generator, state in self._states:
                    generator.set_state(state)


_generators = _Generators()


@contextmanager
def contained(sae: EncodesDensely, device: torch.device) -> Iterator[None]:
    """Run somebody else's code so that it neither ends the process nor moves PyTorch's random number generators.

    In one thread, what it draws itself is the same at every call. Raises `RequestError` in place of ``SystemExit``.
    """
    _generators.enter(device)
    try:
        yield
    except SystemExit as error:
        name = type(sae).__name__
        raise RequestError(f"`saes`: the {name} exits the process (SystemExit {error.code})") from error
    finally:
        _generators.leave()
