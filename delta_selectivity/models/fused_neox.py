"""GPT-NeoX blocks (Pythia) in bfloat16 on a CPU that read and write memory less often.

Transformers calls a function for each sum, each GELU and each part of the rotary embedding, and each call reads and
writes whole tensors. Here oneDNN applies GELU, and adds to the residual stream, inside the matrix product before it, on
float32 sums that are rounded once; queries and keys are rotated where they are. Timings: `python -m
benchmarks.bench_kernels`.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from delta_selectivity.models.places import Tap
from delta_selectivity.system.compiled import compiled
from delta_selectivity.system.processor import has_fast_bfloat16

NAN = np.uint16(0x7FC0)


def fuse(decoder: nn.Module, taps: Collection[Tap]) -> None:
    """Speed up the blocks in place. What taps read inside a block is still computed as a value of its own.

    Can be called again with fewer taps: blocks that are already fused stay as they are.
    """
    if not has_fast_bfloat16():
        return
    tapped = {id(tap.module) for tap in taps}
    for block in decoder.modules():
        if type(block).__name__ != "GPTNeoXLayer" or not _in_bfloat16(block):
            continue
        mlp: Any = block.mlp
        is_gelu = type(mlp.act).__name__ == "GELUActivation"
        if is_gelu and type(mlp.dense_h_to_4h) is nn.Linear and not tapped & {id(mlp.dense_h_to_4h), id(mlp.act)}:
            mlp.dense_h_to_4h.__class__ = LinearWithGelu
            mlp.act = nn.Identity()
        inside = {id(part) for part in block.modules()} - {id(block)}
        if not tapped & inside and not is_fused(block):
            block.forward = partial(_forward, block, block.forward)


def is_fused(block: nn.Module) -> bool:
    """Return whether `fuse` replaced the whole block's forward pass."""
    return "forward" in vars(block)


class LinearWithGelu(nn.Linear):
    """A linear layer followed by the exact GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return GELU(x weightᵀ + bias) `[..., n]` for x `[..., d]`."""
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.weight, self.bias, "gelu", [], "none")


def linear_and_add(layer: nn.Linear, x: Tensor, other: Tensor) -> Tensor:
    """Return x weightᵀ + bias + other `[..., n]` for x `[..., d]`, rounded once."""
    return torch.ops.mkldnn._linear_pointwise.binary(x.contiguous(), other, layer.weight, layer.bias, "add")


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, d_head: int) -> None:
    """Apply the rotary embedding (Su et al. 2021, arXiv 2104.09864) to queries and keys, in place.

    Args:
        qkv: bfloat16 ``[texts, tokens, heads x 3 x d_head]``, contiguous: query, key and value of each head.
        cos: bfloat16 ``[tokens, n]``: the first n dimensions are rotated, i together with i + n / 2.
        sin: The same.
        d_head: Width of a head.
    """
    half = cos.shape[1] // 2
    _rotate(qkv.view(torch.uint16).numpy(), cos[:, :half].float().numpy(), sin[:, :half].float().numpy(), d_head)


def _in_bfloat16(block: nn.Module) -> bool:
    return all(p.dtype == torch.bfloat16 and p.device.type == "cpu" for p in block.parameters())


def _forward(block: Any, plain: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
    """Return the residual stream after the block, `[texts, tokens, d]`; plain: the block's own forward pass."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention, mlp = block.attention, block.mlp
    embeddings: tuple[Tensor, Tensor] | None = options.get("position_embeddings")
    attend = ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation)
    if args or attend is None or embeddings is None or len(embeddings[0]) != 1 or options.get("layer_past") is not None:
        whole: Tensor = plain(hidden_states, *args, **options)
        return whole
    cos, sin = embeddings
    qkv = attention.query_key_value(block.input_layernorm(hidden_states))
    rotate(qkv, cos[0], sin[0], attention.head_size)
    heads = qkv.unflatten(-1, (-1, 3 * attention.head_size)).transpose(1, 2).chunk(3, dim=-1)
    found, _ = attend(attention, *heads, options.get("attention_mask"), scaling=attention.scaling)
    after = linear_and_add(attention.dense, found.flatten(2), hidden_states)
    read = hidden_states if block.use_parallel_residual else after
    inner = mlp.act(mlp.dense_h_to_4h(block.post_attention_layernorm(read)))
    return linear_and_add(mlp.dense_4h_to_h, inner, after)


@compiled()
def _rotate(qkv: NDArray[np.uint16], cos: NDArray[np.float32], sin: NDArray[np.float32], d_head: int) -> None:
    """Rotate the bits of bfloat16 numbers, which are the upper halves of float32 numbers."""
    n_texts, n_tokens, width = qkv.shape
    half = cos.shape[1]
    bits = np.empty(2 * half, np.uint32)
    values = bits.view(np.float32)
    for text in range(n_texts):
        for token in range(n_tokens):
            row = qkv[text, token]
            for head in range(width // d_head):
                if head % 3 == 2:  # a value
                    continue
                part = row[head * d_head : head * d_head + 2 * half]
                for i in range(2 * half):
                    bits[i] = np.uint32(part[i]) << np.uint32(16)
                for i in range(half):
                    a, b, c, s = values[i], values[half + i], cos[token, i], sin[token, i]
                    values[i] = a * c - b * s
                    values[half + i] = b * c + a * s
                for i in range(2 * half):
                    odd = (bits[i] >> np.uint32(16)) & np.uint32(1)  # round to nearest, ties to even
                    rounded = np.uint16((bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))
                    part[i] = rounded if values[i] == values[i] else NAN
