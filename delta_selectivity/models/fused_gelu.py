"""GELU inside the matrix product before it, for GPT-NeoX models (Pythia) in bfloat16 on a CPU.

oneDNN applies it to the product's float32 sums before they are rounded and stored. As a call of its own, it
reads and writes a tensor four times as wide as the residual stream (`python -m benchmarks.bench_kernels`).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from delta_selectivity.models.places import Tap
from delta_selectivity.system.processor import has_fast_bfloat16


def fuse_gelu(decoder: nn.Module, taps: Collection[Tap]) -> None:
    """Fuse GELU into the up-projections, in place, except where a tap reads the value between the two."""
    tapped = {id(tap.module) for tap in taps}
    for mlp in decoder.modules():
        if type(mlp).__name__ != "GPTNeoXMLP" or type(mlp.act).__name__ != "GELUActivation":
            continue
        up, act = mlp.dense_h_to_4h, mlp.act
        fits = type(up) is nn.Linear and up.weight.dtype == torch.bfloat16 and up.weight.device.type == "cpu"
        if fits and has_fast_bfloat16() and not tapped & {id(up), id(act)}:
            up.__class__ = LinearWithGelu
            mlp.act = nn.Identity()


class LinearWithGelu(nn.Linear):
    """A linear layer followed by the exact GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return GELU(x weightᵀ + bias) `[..., n]` for x `[..., d]`."""
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.weight, self.bias, "gelu", [], "none")
