"""Matrix products: floating-point ones by the fastest library for this CPU, and exact int8.

    gemm.linear(x, weight, bias)      # x weightᵀ + bias, as torch.nn.functional.linear
    gemm.use_in(module)               # the same for all linear layers of a model
    gemm.byte_products(x, weight)     # x weightᵀ of int8, exact

Torch computes float32 products with MKL, which is slow on CPUs other than Intel's. With AVX-512, which MKL does not use
there, oneDNN, torch's library for bfloat16, takes half the time on an AMD EPYC; with AVX2 alone, NumPy's OpenBLAS takes
three quarters (`python -m benchmarks.bench_kernels`). All sum in float32, in different orders. `processor` selects the
library. In bfloat16, torch first copies the bias into the result; called directly, oneDNN adds it to the sums. OpenBLAS
multiplies only where torch has one thread (`cores.sharing_cores`): its own threads would compete with torch's.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from delta_selectivity.system.processor import prefers_onednn, prefers_openblas

_MANY = 32  # rows from which OpenBLAS is faster than MKL


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weightᵀ + bias ``[..., n]`` for x ``[..., d]``, weight ``[n, d]`` and bias ``[n]``."""
    if x.dtype == weight.dtype and x.device.type == "cpu" and x.numel():
        if x.dtype in (torch.float32, torch.bfloat16) and prefers_onednn():
            return torch.ops.mkldnn._linear_pointwise(x.contiguous(), _with_unit_stride(weight), bias, "none", [], "")
        has_many_rows = x.numel() >= _MANY * x.shape[-1]
        if x.dtype == torch.float32 and has_many_rows and torch.get_num_threads() == 1 and prefers_openblas():
            return _by_openblas(x.contiguous(), _with_unit_stride(weight), bias)
    return F.linear(x, weight, bias)


def use_in(module: nn.Module) -> None:
    """Make every linear layer of a module, or the module itself, multiply with `linear`, in place."""
    for part in module.modules() if prefers_onednn() or prefers_openblas() else ():
        if type(part) is nn.Linear:
            part.__class__ = _Linear


def byte_products(x: Tensor, weight: Tensor) -> NDArray[np.int32]:
    """Return x weightᵀ, exact, as int32 ``[n, m]`` for int8 x ``[n, d]`` and weight ``[m, d]`` on a CPU, d up to 2^16.

    The result is in a buffer of this thread that its next call overwrites: allocating memory for each product would
    take as long as the product.
    """
    n, m = len(x), len(weight)
    if _memory.products.size < n * m:
        _memory.products = np.empty(n * m, np.int32)
    products = _memory.products[: n * m].reshape(n, m)
    torch._int_mm(x, weight.T, out=torch.from_numpy(products))
    return products


def _with_unit_stride(weight: Tensor) -> Tensor:
    """Return the weight, copied if it is neither contiguous nor transposed: both libraries are slow then."""
    return weight if weight.is_contiguous() or weight.T.is_contiguous() else weight.contiguous()


def _by_openblas(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_empty(*x.shape[:-1], len(weight))  # torch's memory, whose failures are known (`out_of_memory`)
    rows, columns, products = (part.detach().numpy() for part in (x.flatten(0, -2), weight.T, out.flatten(0, -2)))
    with np.errstate(all="ignore"):  # as torch
        np.matmul(rows, columns, out=products)
    return out if bias is None else out.add_(bias)


class _Memory(threading.local):
    products = np.empty(0, np.int32)


_memory = _Memory()


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
