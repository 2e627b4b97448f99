"""What a CPU multiplies fast, and float32 matrix products by the library that is fast on it.

    gemm.linear(x, weight, bias)      # x weightᵀ + bias, as torch.nn.functional.linear
    gemm.use_in(module)               # the same for all linear maps of a model

Torch gives float32 products to MKL, which on CPUs of other makers than Intel leaves half of their instructions unused.
oneDNN, to which torch gives bfloat16, uses them: on an AMD EPYC with AVX-512 it takes half the time
(`python benchmarks/bench_kernels.py`). Both add up in float32, in other orders.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
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


@cache
def prefers_onednn() -> bool:
    """Whether this machine's MKL is the slower library."""
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and not _made_by_intel()


@cache
def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def _made_by_intel() -> bool:
    cpu = Path("/proc/cpuinfo")
    return "GenuineIntel" in (cpu.read_text(encoding="utf-8") if cpu.exists() else platform.processor())
