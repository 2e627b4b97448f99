"""Causal attention over short texts in bfloat16 on a CPU: two matrix products and a compiled softmax.

Torch's fused kernel is designed for long texts: it never stores the scores of all pairs of tokens. For a hundred tokens
these are few. Without the fused kernel's overhead, attention takes half the time on AMD CPUs, but twice as long on
Intel CPUs (`python -m benchmarks.bench_kernels`). Scores are rounded to bfloat16, as in transformers' own eager
attention. All other cases, including longer texts, use transformers' `sdpa`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from delta_selectivity.system.processor import has_fast_attention

NAME = "sdpa_or_products"
"""Name of this implementation in transformers' registry of attention functions."""
MAX_TOKENS = 768
"""Maximum number of tokens for which matrix products are faster."""
CHUNK = 2**20
"""Scores computed at a time: few calls for short texts, and little memory for many heads (2 MB)."""


def use_where_faster(model: Any, device: torch.device) -> None:
    """Switch a transformers model to this attention if it uses sdpa and the processor runs this faster."""
    fits = device.type == "cpu" and model.dtype == torch.bfloat16 and has_fast_attention()
    if not fits or getattr(model.config, "_attn_implementation", None) != "sdpa":
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return the heads' outputs ``[texts, tokens, heads, d_head]``; query has shape ``[texts, heads, tokens, d_head]``.

    Cases that this implementation does not cover are passed to transformers' own function, with all options.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    from delta_selectivity.models.block_kernels import causal_softmax  # lazily: loading compiled kernels is slow

    n_texts, n_heads, n_tokens, d_head = query.shape
    causal = attention_mask is None and options.get("is_causal") in (None, True) and getattr(module, "is_causal", True)
    plain = causal and options.get("position_bias") is None and not options.get("dropout")
    if not plain or n_tokens > MAX_TOKENS or key.shape[2] != n_tokens:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    groups = n_heads // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    factor = np.float32(d_head**-0.5 if scaling is None else scaling)
    found = query.new_empty(n_texts, n_tokens, n_heads, value.shape[-1])
    step = max(1, CHUNK // (n_heads * n_tokens**2))
    scores = query.new_empty(min(step, n_texts) * n_heads, n_tokens, n_tokens)
    values = np.empty(n_tokens, np.float32)
    for first in range(0, n_texts, step):
        chunk = slice(first, first + step)
        products = scores[: len(query[chunk]) * n_heads]
        torch.bmm(query[chunk].flatten(0, 1), key[chunk].flatten(0, 1).transpose(1, 2), out=products)
        causal_softmax(products.view(torch.uint16).numpy(), factor, values)
        heads = torch.bmm(products, value[chunk].flatten(0, 1))
        found[chunk] = heads.unflatten(0, (-1, n_heads)).transpose(1, 2)
    return found, None
