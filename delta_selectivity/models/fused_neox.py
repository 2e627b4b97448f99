"""GPT-NeoX blocks (Pythia) on a CPU that read and write memory less often, and compute only what is read.

Transformers calls a function for each sum, each GELU and each part of the rotary embedding, and each call reads and
writes whole tensors. Here one loop separates the heads and rotates queries and keys. In bfloat16 one loop computes both
layer norms of a token, and oneDNN applies GELU, and adds to the residual stream, inside the matrix product before it,
on float32 sums that are rounded once. In float32 the values are those of transformers, bit by bit. Timings: `python -m
benchmarks.bench_kernels`.

No token needs another one's output of the last block, so that block has queries, an MLP and sums only for the tokens
that are read:

    with reading(wanted):        # bool [texts, tokens]
        decoder(input_ids=ids)   # the last block's output is 0 at other tokens

What the first block computes before attention depends on the token alone, and its MLP too where it reads the block's
input (`use_parallel_residual`). So these products are computed once for each token of the vocabulary that occurs:

    with running(ids):           # int64 [texts, tokens]
        decoder(input_ids=ids)
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from delta_selectivity.models.places import Tap
from delta_selectivity.system.processor import has_fast_bfloat16

FEW = 0.5  # share of the tokens up to which computing only those is faster: the rest is gathered and scattered
ROWS = 128  # their number is a multiple of this: oneDNN compiles products for each number of rows, and keeps them
FEW_ROWS = 32  # the same for tokens that are new in a batch
MAX_TABLE_BYTES = 2**29  # of a whole vocabulary's rows; memory is taken only for tokens that occur

_wanted: ContextVar[Tensor | None] = ContextVar("tokens that are read", default=None)
_ids: ContextVar[Tensor | None] = ContextVar("ids of the tokens that run", default=None)


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
        if is_gelu and not tapped & {id(mlp.dense_h_to_4h), id(mlp.act)}:
            if coarse:
                mlp.dense_h_to_4h.__class__, mlp.act = LinearWithGelu, nn.Identity()
            else:
                mlp.act = GeluInPlace()
        inside = {id(part) for part in block.modules()} - {id(block)}
        if not tapped & inside:
            block.is_last = block is blocks[-1]
            if not is_fused(block):
                block.table = TokenTable.of(block, decoder) if block is blocks[0] else None
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


@contextmanager
def running(ids: Tensor) -> Iterator[None]:
    """Let the first block know the ids of its tokens inside the context: int64 ``[texts, tokens]`` on the CPU."""
    token = _ids.set(ids)
    try:
        yield
    finally:
        _ids.reset(token)


class TokenTable:
    """What the first block computes from a token alone, for each token of the vocabulary that has occurred."""

    def __init__(self, block: Any, n_tokens: int, like: Tensor) -> None:
        """Allocate the table for n_tokens ids; like: a weight of the dtype of the values."""
        d = block.attention.query_key_value.in_features
        self._block, self._filling = block, threading.Lock()
        self._is_known = torch.zeros(n_tokens, dtype=torch.bool)
        self.qkv = like.new_empty(n_tokens, 3 * d)  # queries, keys and values before rotation
        self.mlp = like.new_empty(n_tokens, d)  # the MLP's output, in bfloat16 added to the block's input

    @classmethod
    def of(cls, block: Any, decoder: Any) -> TokenTable | None:
        """Return the table of a decoder's first block; None if its MLP reads more, or if the table is too large."""
        weight = block.attention.query_key_value.weight
        n_tokens = decoder.get_input_embeddings().num_embeddings
        if not block.use_parallel_residual or 4 * n_tokens * weight.shape[1] * weight.itemsize > MAX_TABLE_BYTES:
            return None
        return cls(block, n_tokens, weight)

    def fill(self, ids: Tensor, x: Tensor) -> None:
        """Make the rows of these tokens known: ids int64 `[tokens]`, x `[tokens, d]` the block's input there."""
        if self._is_known[ids].all():
            return
        with self._filling:
            new, place = np.unique(ids.numpy(), return_index=True)
            unknown = ~self._is_known.numpy()[new]
            new, place = new[unknown], place[unknown]
            if not len(new):
                return
            padded = torch.from_numpy(np.concatenate([place, np.repeat(place[:1], -len(new) % FEW_ROWS)]))
            read, kept = x.index_select(0, padded), torch.from_numpy(new)
            both = layer_norms(read, self._block.input_layernorm, self._block.post_attention_layernorm)
            qkv, mlp = self._block.attention.query_key_value(both[0]), _mlp(self._block, both[1], read)
            self.qkv.index_copy_(0, kept, qkv[: len(new)])
            self.mlp.index_copy_(0, kept, mlp[: len(new)])
            self._is_known[kept] = True


class LinearWithGelu(nn.Linear):
    """A linear layer followed by the exact GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return GELU(x weightᵀ + bias) `[..., n]` for x `[..., d]`."""
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.weight, self.bias, "gelu", [], "none")


class GeluInPlace(nn.Module):
    """The exact GELU, in its argument's memory."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x of any shape, overwritten by GELU(x)."""
        return torch.ops.aten.gelu_(x)


def linear_and_add(layer: nn.Linear, x: Tensor, other: Tensor) -> Tensor:
    """Return x weightᵀ + bias + other `[..., n]` for x `[..., d]`, rounded once."""
    return torch.ops.mkldnn._linear_pointwise.binary(x.contiguous(), other, layer.weight, layer.bias, "add")


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, d_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys with the rotary embedding (Su et al. 2021, arXiv 2104.09864), and values.

    Args:
        qkv: bfloat16 or float32 ``[texts, tokens, heads x 3 x d_head]``, contiguous: query, key and value of each head.
        cos: ``[tokens, n]``: the first n dimensions are rotated, i together with i + n / 2.
        sin: The same.
        d_head: Width of a head.

    Returns:
        Contiguous tensors of the same dtype ``[texts, heads, tokens, d_head]``.
    """
    from delta_selectivity.models.block_kernels import rotate_heads  # lazily: loading compiled kernels is slow

    n_texts, n_tokens, width = qkv.shape
    half = cos.shape[1] // 2
    query, key, value = qkv.new_empty(3, n_texts, width // (3 * d_head), n_tokens, d_head).unbind()
    numbers = torch.empty(2 * half, dtype=torch.float32)  # whatever the caller's default
    is_coarse = qkv.dtype == torch.bfloat16
    given, *results = ((_bits(x) if is_coarse else x.numpy()) for x in (qkv, query, key, value))
    factors = (part[:, :half].float().numpy() for part in (cos, sin))
    bits = numbers.view(torch.uint32).numpy() if is_coarse else None
    rotate_heads(given, *factors, *results, numbers.numpy(), bits)
    return query, key, value


def layer_norms(x: Tensor, *layers: nn.LayerNorm) -> tuple[Tensor, ...]:
    """Return layer norms with the same eps of x `[..., d]`, each `[..., d]`; in bfloat16 by one loop."""
    if x.dtype != torch.bfloat16:
        return tuple(layer(x) for layer in layers)
    from delta_selectivity.models.block_kernels import layer_norms as compiled_norms

    weights, biases = (torch.stack([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    results, row = x.new_empty(len(layers), *x.shape), np.empty(x.shape[-1], np.float32)
    rows = x.contiguous().flatten(0, -2)
    compiled_norms(
        _bits(rows), np.float32(layers[0].eps), _bits(weights), _bits(biases), _bits(results.flatten(1, -2)), row
    )
    return results.unbind()


def _bits(x: Tensor) -> np.ndarray:
    """Return the bits of bfloat16 numbers, as the compiled loops take them."""
    return x.detach().view(torch.uint16).numpy()


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
    x, shape = hidden_states.flatten(0, 1), hidden_states.shape
    read = _wanted_tokens(hidden_states) if block.is_last and mask is None else None
    ids: Tensor | None = None if block.table is None else _ids.get()
    normed: list[Tensor] = []
    if ids is not None and ids.shape == shape[:2]:
        ids = ids.flatten()
        block.table.fill(ids, x)
        qkv = block.table.qkv.index_select(0, ids)
    else:
        ids, norms = None, [block.input_layernorm]
        if read is None and block.use_parallel_residual:
            norms.append(block.post_attention_layernorm)
        first, *normed = layer_norms(x, *norms)
        qkv = attention.query_key_value(first)
    query, key, value = rotate(qkv.unflatten(0, shape[:2]), cos[0], sin[0], attention.head_size)
    if read is None:
        found, _ = attend(attention, query, key, value, mask, scaling=attention.scaling)
        mlp = None if ids is None else block.table.mlp.index_select(0, ids)
        return _add_attention_and_mlp(block, x, found.flatten(2).flatten(0, 1), mlp, *normed).view_as(hidden_states)
    some = read.tokens[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    past = torch.arange(key.shape[2]) <= read.tokens[..., None]
    found = scaled_dot_product_attention(
        query.gather(2, some), key, value, attn_mask=past[:, None], scale=attention.scaling
    )
    rows = found.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, read.rows)
    mlp = None if ids is None else block.table.mlp.index_select(0, ids.index_select(0, read.place))
    values = _add_attention_and_mlp(block, x.index_select(0, read.place), rows, mlp)
    return torch.zeros_like(x).index_copy_(0, read.place, values).view_as(hidden_states)


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


def _add_attention_and_mlp(
    block: Any, x: Tensor, found: Tensor, mlp: Tensor | None, normed: Tensor | None = None
) -> Tensor:
    """Return the residual stream after the block for that before it.

    found: the heads' outputs; mlp: `TokenTable.mlp`, None: to be computed; normed: the MLP's input, None: the same;
    all `[tokens, d]`.
    """
    dense, norm = block.attention.dense, block.post_attention_layernorm
    if x.dtype == torch.bfloat16:
        if mlp is not None:
            return linear_and_add(dense, found, mlp)
        after = linear_and_add(dense, found, x)
        if normed is None:
            (normed,) = layer_norms(x if block.use_parallel_residual else after, norm)
        return _mlp(block, normed, after)
    after = dense(found)  # in memory of its own
    if block.use_parallel_residual:
        if mlp is None:
            mlp = _mlp(block, norm(x) if normed is None else normed, x)
        return after.add_(mlp).add_(x)
    after.add_(x)
    return _mlp(block, norm(after), after).add_(after)


def _mlp(block: Any, normed: Tensor, other: Tensor) -> Tensor:
    """Return the MLP's output for its input, in bfloat16 plus `other`; all `[tokens, d]`."""
    mlp = block.mlp
    if normed.dtype == torch.bfloat16:
        return linear_and_add(mlp.dense_4h_to_h, mlp.act(mlp.dense_h_to_4h(normed)), other)
    return mlp(normed)
