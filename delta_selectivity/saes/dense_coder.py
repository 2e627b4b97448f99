"""A coder that wraps foreign ``encode`` and ``decode`` methods with dense codes.

Codes are converted to sparse form on return, and back to dense form a few rows at a time for decoding.
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
"""Rows to decode at a time."""


class EncodesDensely(Protocol):
    """The usual interface of an SAE. Rows must be independent: batches are split to fit into memory."""

    def encode(self, x: Tensor, /) -> Tensor:
        """Encode activations ``[rows, d_in]`` as ``[rows, d_sae]``."""
        ...

    def decode(self, codes: Tensor, /) -> Tensor:
        """Decode codes ``[rows, d_sae]`` into reconstructions ``[rows, d_out]``."""
        ...


@dataclass(frozen=True)
class DenseCoder:
    """A coder around an object with dense ``encode`` and ``decode``. Only a ``nn.Module`` moves between devices."""

    sae: EncodesDensely
    d_out: int
    d_sae: int | None  # columns of its codes; None if not known yet
    compute_device: torch.device  # device on which the object computes
    device: torch.device  # device of the returned codes and reconstructions
    dtype: torch.dtype  # dtype in which the object computes

    @classmethod
    def of(cls, sae: EncodesDensely, d_out: int, d_sae: int | None = None) -> DenseCoder:
        """Wrap an object with the device and dtype of its tensors; CPU and float32 if it is not a module."""
        tensors: list[Tensor] = [*sae.parameters(), *sae.buffers()] if isinstance(sae, nn.Module) else []
        weights = (tensor for tensor in tensors if tensor.is_floating_point())
        weight = next(weights, torch.zeros(0, dtype=torch.float32, device="cpu"))
        return cls(sae, d_out, d_sae, weight.device, weight.device, weight.dtype)

    def encode(self, x: Tensor) -> SparseRows:
        with isolated(self.sae, self.compute_device):  # with a copy, because encode may modify x, which is shared
            codes = self.sae.encode(x.to(self.compute_device, copy=True))
        return nonzero_codes(self._checked(codes, "encode", len(x), self.d_sae).to(self.device))

    def decode(self, codes: SparseRows, x: Tensor | None = None) -> Tensor:
        rows = torch.arange(codes.n_rows, device=codes.crow.device).repeat_interleave(codes.crow.diff())
        recon = torch.empty(codes.n_rows, self.d_out, dtype=torch.float32, device=self.device)
        for start in range(0, codes.n_rows, DENSE_ROWS):
            stop = min(start + DENSE_ROWS, codes.n_rows)
            entries = slice(int(codes.crow[start]), int(codes.crow[stop]))
            dense = torch.zeros(stop - start, codes.n_cols, dtype=self.dtype, device=self.device)
            dense[rows[entries] - start, codes.col[entries]] = codes.value[entries].to(self.dtype)
            with isolated(self.sae, self.compute_device):
                found = self.sae.decode(dense.to(self.compute_device))
            recon[start:stop] = self._checked(found, "decode", stop - start, self.d_out)
        recon[rows[codes.value.isfinite().logical_not_()]] = torch.nan  # decode may ignore latents that are not finite
        return recon

    def _checked(self, found: Any, method: str, rows: int, width: int | None) -> Tensor:
        """Return a method's result. Raises `RequestError` if it is not a dense real matrix of the expected shape."""
        if problem := misshapen(found, rows, width):
            raise RequestError(f"`saes` {type(self.sae).__name__}: {method} of {rows} rows returned {problem}")
        return found

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> DenseCoder:
        device, dtype = torch.device(device), dtype or self.dtype
        if not isinstance(self.sae, nn.Module):
            return replace(self, device=device)
        if (device, dtype) == (self.compute_device, self.dtype):
            return self
        moved: Any = copy.deepcopy(self.sae).to(device=device, dtype=dtype)
        return DenseCoder(moved, self.d_out, self.d_sae, device, device, dtype)


def misshapen(found: Any, rows: int, width: int | None = None) -> str | None:
    """Describe a result that is not a dense real tensor ``[rows, width]``; return None if it is one."""
    needed = f"it must return a dense tensor [{rows}, {'width' if width is None else width}] of real numbers"
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
    """Saves, seeds and restores PyTorch's random number generators around foreign code in one or more threads.

    The first thread to enter saves and seeds them; the last to leave restores them.
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
def isolated(sae: EncodesDensely, device: torch.device) -> Iterator[None]:
    """Run foreign code without letting it exit the process or advance PyTorch's random number generators.

    Within one thread the code's own random draws are the same at every call. ``SystemExit`` becomes `RequestError`.
    """
    _generators.enter(device)
    try:
        yield
    except SystemExit as error:
        name = type(sae).__name__
        raise RequestError(f"`saes`: {name} called exit (SystemExit {error.code})") from error
    finally:
        _generators.leave()
