"""GPT-NeoX blocks (Pythia) on a CPU that read and write memory less often, and compute only what is read.

Transformers calls a function for each sum, each GELU and each part of the rotary embedding, and each call reads and
writes whole tensors. Here queries and keys are rotated where they are, and in bfloat16 oneDNN applies GELU, and adds to
the residual stream, inside the matrix product before it, on float32 sums that are rounded once. In float32 the values
are those of transformers, bit by bit. Timings: `python -m benchmarks.bench_kernels`.

No token needs another one's output of the last block, so that block has queries, an MLP and sums only for the tokens
that are read:

    with reading(wanted):        # bool [texts, tokens]
        decoder(input_ids=ids)   # the last block's output is 0 at other tokens
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from delta_selectivity.models.places import Tap
from delta_selectivity.system.processor import has_fast_bfloat16

FEW = 0.5  # share of the tokens up to which computing only those is faster: the rest is gathered and scattered
ROWS = 128  # their number is a multiple of this: oneDNN compiles products for each number of rows, and keeps them

_wanted: ContextVar[Tensor | None] = ContextVar("tokens that are read", default=None)


def fuse(decoder: nn.Module, taps: Collection[Tap]) -> None:
    """Speed up the blocks in place. What taps read inside a block is still computed as a value of its own.

    Can be called again with fewer taps: blocks that are already fused stay as they are.
    """
    tapped = {id(tap.module) for tap in taps}
    blocks: list[Any] = [block for block in decoder.modules() if type(block).__name__ == "GPTNeoXLayer"]
    for block in blocks:
        coarse = _is_on_cpu(block, torch.bfloat16) and has_fast_bfloat16()
        if not coarse and not _is_on_cpu(block, torch.float32):
            continue
        mlp = block.mlp
        is_gelu = type(mlp.act).__name__ == "GELUActivation" and type(mlp.dense_h_to_4h) is nn.Linear
        if coarse and is_gelu and not tapped & {id(mlp.dense_h_to_4h), id(mlp.act)}:
            mlp.dense_h_to_4h.__class__ = LinearWithGelu
            mlp.act = nn.Identity()
        inside = {id(part) for part in block.modules()} - {id(block)}
        if not tapped & inside:
            block.is_last = block is blocks[-1]
            if not is_fused(block):
                block.forward = partial(_forward, block, block.forward)


def is_fused(block: nn.Module) -> bool:
    """Return whether `fuse` replaced the whole block's forward pass."""
    return "forward" in vars(block)


@contextmanager
def reading(wanted: Tensor) -> Iterator[None]:
    """Compute the last block's output only for some tokens inside the context: bool ``[texts, tokens]``."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


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
        qkv: bfloat16 or float32 ``[texts, tokens, heads x 3 x d_head]``, contiguous: query, key and value of each head.
        cos: ``[tokens, n]``: the first n dimensions are rotated, i together with i + n / 2.
        sin: The same.
        d_head: Width of a head.
    """
    from delta_selectivity.models.rotary_kernel import rotate_heads  # lazily: loading compiled kernels is slow

    half = cos.shape[1] // 2
    is_coarse = qkv.dtype == torch.bfloat16
    values = torch.empty(2 * half, dtype=torch.float32)  # whatever the caller's default
    rotate_heads(
        (qkv.view(torch.uint16) if is_coarse else qkv).numpy(),
        cos[:, :half].float().numpy(),
        sin[:, :half].float().numpy(),
        d_head,
        values.numpy(),
        values.view(torch.uint32).numpy() if is_coarse else None,
    )


def _is_on_cpu(block: nn.Module, dtype: torch.dtype) -> bool:
    return all(p.dtype == dtype and p.device.type == "cpu" for p in block.parameters())


def _forward(block: Any, plain: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
    """Return the residual stream after the block, `[texts, tokens, d]`; plain: the block's own forward pass."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention = block.attention
    embeddings: tuple[Tensor, Tensor] | None = options.get("position_embeddings")
    attend = ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation)
    simple = not args and options.get("layer_past") is None and hidden_states.device.type == "cpu"
    if not simple or attend is None or embeddings is None or len(embeddings[0]) != 1:
        whole: Tensor = plain(hidden_states, *args, **options)
        return whole
    cos, sin = embeddings
    mask = options.get("attention_mask")
    qkv = attention.query_key_value(block.input_layernorm(hidden_states))
    rotate(qkv, cos[0], sin[0], attention.head_size)
    query, key, value = qkv.unflatten(-1, (-1, 3 * attention.head_size)).transpose(1, 2).chunk(3, dim=-1)
    read = _wanted_tokens(hidden_states) if block.is_last and mask is None else None
    if read is None:
        found, _ = attend(attention, query, key, value, mask, scaling=attention.scaling)
        return _add_attention_and_mlp(block, hidden_states, found.flatten(2))
    some = read.tokens[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    past = torch.arange(key.shape[2]) <= read.tokens[..., None]
    found = scaled_dot_product_attention(
        query.gather(2, some), key, value, attn_mask=past[:, None], scale=attention.scaling
    )
    rows = found.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, read.rows)
    values = _add_attention_and_mlp(block, hidden_states.flatten(0, 1).index_select(0, read.place), rows)
    return torch.zeros_like(hidden_states).flatten(0, 1).index_copy_(0, read.place, values).view_as(hidden_states)


class _Read(NamedTuple):
    """The tokens of a batch that are read."""

    tokens: Tensor  # int64 [texts, n], positions in each text; texts with fewer than others have others too
    rows: Tensor  # int64 [read], which of the texts x n are read; some twice, to a multiple of `ROWS`
    place: Tensor  # int64 [read], text x tokens + position of each


def _wanted_tokens(x: Tensor) -> _Read | None:
    """Return the wanted tokens of x `[texts, tokens, d]`; None: all."""
    wanted = _wanted.get()
    if wanted is None or wanted.shape != x.shape[:2] or not wanted.any():
        return None
    most = int(wanted.sum(dim=1).max())
    if most > FEW * wanted.shape[1]:
        return None
    is_read, tokens = (part[:, :most] for part in wanted.sort(dim=1, descending=True, stable=True))
    rows = is_read.flatten().nonzero()[:, 0]
    rows = torch.cat([rows, rows[:1].expand(-len(rows) % ROWS)])
    place = torch.arange(len(wanted))[:, None] * wanted.shape[1] + tokens
    return _Read(tokens, rows, place.flatten().index_select(0, rows))


def _add_attention_and_mlp(block: Any, x: Tensor, found: Tensor) -> Tensor:
    """Return the residual stream after the block for that before it; found: the heads' outputs; all `[..., d]`."""
    dense, mlp = block.attention.dense, block.mlp
    if x.dtype == torch.bfloat16:
        after = linear_and_add(dense, found, x)
        read = x if block.use_parallel_residual else after
        inner = mlp.act(mlp.dense_h_to_4h(block.post_attention_layernorm(read)))
        return linear_and_add(mlp.dense_4h_to_h, inner, after)
    if block.use_parallel_residual:
        return mlp(block.post_attention_layernorm(x)) + dense(found) + x
    after = dense(found) + x
    return mlp(block.post_attention_layernorm(after)) + after
