"""Matrix products: floating-point ones by the fastest library for this CPU, and exact int8.

    gemm.linear(x, weight, bias)      # x weightᵀ + bias, as torch.nn.functional.linear
    gemm.use_in(module)               # the same for all linear layers of a model
    gemm.byte_products(x, weight)     # x weightᵀ of int8, exact

Torch computes float32 products with MKL, which does not use AVX-512 on CPUs other than Intel's. oneDNN, which torch
uses for bfloat16, does: on an AMD EPYC with AVX-512 it takes half the time (`python -m benchmarks.bench_kernels`). Both
sum in float32, in different orders. `processor` selects the library. In bfloat16, torch first copies the bias into the
result; called directly, oneDNN adds it to the sums.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from delta_selectivity.system.processor import prefers_onednn

_BY_ONEDNN = (torch.float32, torch.bfloat16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weightᵀ + bias ``[..., n]`` for x ``[..., d]``, weight ``[n, d]`` and bias ``[n]``."""
    if x.dtype == weight.dtype in _BY_ONEDNN and x.device.type == "cpu" and x.numel() and prefers_onednn():
        if not (weight.is_contiguous() or weight.T.is_contiguous()):
            weight = weight.contiguous()  # for other strides oneDNN is slow
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def use_in(module: nn.Module) -> None:
    """Make every linear layer of a module, or the module itself, multiply with `linear`, in place."""
    for part in module.modules() if prefers_onednn() else ():
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


class _Memory(threading.local):
    products = np.empty(0, np.int32)


_memory = _Memory()


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
