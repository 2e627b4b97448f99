"""Multiply float32 matrices by the library that is fast on this CPU, and signed bytes exactly.

    gemm.linear(x, weight, bias)      # x weightᵀ + bias, as torch.nn.functional.linear
    gemm.use_in(module)               # the same for all linear maps of a model
    gemm.byte_products(x, weight)     # x weightᵀ of signed bytes, exactly

Torch gives float32 products to MKL, which leaves the AVX-512 instructions of other CPUs than Intel's unused. oneDNN, to
which torch gives bfloat16, uses them: on an AMD EPYC with AVX-512 it takes half the time
(`python benchmarks/bench_kernels.py`). Both add up in float32, in other orders. `processor` decides.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from delta_selectivity.system.processor import prefers_onednn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias: ``[..., n]`` of x ``[..., d]``, weight ``[n, d]`` and bias ``[n]``."""
    if x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.numel() and prefers_onednn():
        if not (weight.is_contiguous() or weight.T.is_contiguous()):
            weight = weight.contiguous()  # for other strides oneDNN has nothing but loops
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def use_in(module: nn.Module) -> None:
    """Have every linear map in a module, or that it is, multiply by `linear`; the objects stay the same."""
    for part in module.modules() if prefers_onednn() else ():
        if type(part) is nn.Linear:
            part.__class__ = _Linear


def byte_products(x: Tensor, weight: Tensor) -> NDArray[np.int32]:
    """x weightᵀ, exactly: ``[n, m]`` of int8 x ``[n, d]`` and weight ``[m, d]`` on a CPU, d up to 2^16.

    In memory that is this thread's until its next call: new memory for each product would cost as much as the product.
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
