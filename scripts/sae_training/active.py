"""Encode and decode with gradients for active latents only.

    pattern = Pattern(row, column, (rows, d_sae))                  # the places of the active latents
    codes = Codes(pattern, active_values(pre, x, W_enc, bias, pattern))
    recon = decoded(codes, W_dec)                                  # [rows, d_in]

Few latents are active, so products over these places take a fraction of the time of dense ones, whatever the processor.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pattern:
    """Places in a matrix, in order of rows."""

    def __init__(self, row: Tensor, column: Tensor, shape: tuple[int, int]) -> None:
        """Create a pattern. row, column: int64 [places]; shape: that of the matrix."""
        self.row, self.column, self.shape = row, column, shape

    def select(self, places: Tensor) -> Pattern:
        """Return some of the places, whose indices are in ascending order."""
        return Pattern(self.row[places], self.column[places], self.shape)

    def matrix(self, value: Tensor) -> Tensor:
        """Return the sparse CSR matrix with these values."""
        return _csr(self.row, self.column, value, self.shape)

    def transposed(self, value: Tensor) -> Tensor:
        """Return the transpose of `matrix`, in CSR too."""
        order = self._by_column
        rows, columns = self.shape
        return _csr(self.column[order], self.row[order], value[order], (columns, rows))

    @cached_property
    def _by_column(self) -> Tensor:
        return self.column.argsort(stable=True)


def _csr(row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    begin = torch.zeros(shape[0] + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(row, minlength=shape[0]), 0, out=begin[1:])
    return torch.sparse_csr_tensor(begin, column, value, shape, check_invariants=False)


class Codes(NamedTuple):
    """The active latents of some rows, and their values."""

    pattern: Pattern  # in a matrix [rows, d_sae]
    value: Tensor  # float32 [active], positive

    def select(self, places: Tensor) -> Codes:
        """Return some of the active latents, whose indices are in ascending order."""
        return Codes(self.pattern.select(places), self.value[places])


def active_values(pre: Tensor, x: Tensor, w_enc: Tensor, bias: Tensor, pattern: Pattern) -> Tensor:
    """Return pre = x w_enc^T + bias, which is known, at the places of a pattern, with gradients of w_enc and bias."""
    values: Tensor = _ActiveValues.apply(pre, x, w_enc, bias, pattern)
    return values


def decoded(codes: Codes, w_dec: Tensor) -> Tensor:
    """Return the product of the codes and w_dec [d_sae, d_in], with gradients of both."""
    product: Tensor = _Decoded.apply(codes.value, w_dec, codes.pattern)
    return product


class _ActiveValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, x: Tensor, w_enc: Tensor, bias: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern = pattern
        ctx.save_for_backward(x)
        return pre[pattern.row, pattern.column]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (of_value,), (x,), pattern = gradients, ctx.saved_tensors, ctx.pattern
        of_bias = torch.zeros(pattern.shape[1]).index_add_(0, pattern.column, of_value)
        return None, None, pattern.transposed(of_value) @ x, of_bias, None


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, w_dec: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern = pattern
        ctx.save_for_backward(value, w_dec)
        with torch.autocast("cpu", enabled=False):  # sparse products are in float32
            return pattern.matrix(value) @ w_dec

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (of_product,), (value, w_dec), pattern = gradients, ctx.saved_tensors, ctx.pattern
        sparse = pattern.matrix(value)
        of_value = torch.sparse.sampled_addmm(sparse, of_product, w_dec.T, beta=0).values()
        of_w_dec = pattern.transposed(value) @ of_product if ctx.needs_input_grad[1] else None
        return of_value, of_w_dec, None
