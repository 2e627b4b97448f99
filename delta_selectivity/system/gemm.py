"""Choose the library that multiplies float32 matrices fast on this CPU, and say which other types it multiplies fast.

    gemm.linear(x, weight, bias)      # x weightᵀ + bias, as torch.nn.functional.linear
    gemm.use_in(module)               # the same for all linear maps of a model
    gemm.byte_products(x, weight)     # x weightᵀ of signed bytes, exactly

Torch gives float32 products to MKL, which on CPUs of other makers than Intel leaves half of their instructions unused.
oneDNN, to which torch gives bfloat16, uses them: on an AMD EPYC with AVX-512 it takes half the time
(`python benchmarks/bench_kernels.py`). Both add up in float32, in other orders.
"""

from __future__ import annotations

import platform
import threading
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn


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


@cache
def prefers_onednn() -> bool:
    """Whether this machine's MKL is the slower library."""
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and not _made_by_intel()


@cache
def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


@cache
def has_fast_bytes() -> bool:
    """Whether this CPU multiplies matrices of signed bytes faster than float32 ones."""
    found = torch.cpu.get_capabilities()
    has = any(found.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return has and torch.backends.mkldnn.is_available()


class _Memory(threading.local):
    products = np.empty(0, np.int32)


_memory = _Memory()


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def _made_by_intel() -> bool:
    cpu = Path("/proc/cpuinfo")
    return "GenuineIntel" in (cpu.read_text(encoding="utf-8") if cpu.exists() else platform.processor())
