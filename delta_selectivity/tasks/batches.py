"""Batch tokenised mentions of similar length, right-padded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from delta_selectivity.tasks.tokens import TokenisedMentions
from delta_selectivity.tasks.types import Int64Array

PAD_ID = 0  # any valid id: `lengths` marks the real tokens


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Texts for one forward pass, on the CPU."""

    ids: torch.Tensor  # int64 [b, t], right-padded with PAD_ID
    lengths: torch.Tensor  # int64 [b] real tokens, BOS included
    first: torch.Tensor  # int64 [b] first token of the name
    last: torch.Tensor  # int64 [b] last token of the name, inclusive
    mentions: Int64Array  # [b] indices into ProbeTexts.mentions
    has_bos: bool


def batches(
    tokenised: TokenisedMentions, mentions: Int64Array, *, batch_size: int, max_tokens: int | None = None
) -> Iterator[TokenBatch]:
    """Yield batches over `mentions` [n] (indices into `tokenised`), each once, longest first, ties by index.

    A batch holds at most `batch_size` texts and at most `max_tokens` tokens, including padding; a text longer than
    `max_tokens` forms its own batch. The longest texts come first, so that a lack of memory shows in the first batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    lengths = np.array([len(tokenised.ids[i]) for i in mentions], dtype=np.int64)
    order = np.lexsort((mentions, -lengths))
    begin = 0
    while begin < len(order):
        width = int(lengths[order[begin]])
        size = batch_size if max_tokens is None else min(batch_size, max(max_tokens // width, 1))
        yield _batch(tokenised, mentions[order[begin : begin + size]])
        begin += size


def _batch(tokenised: TokenisedMentions, mentions: Int64Array) -> TokenBatch:
    lengths = np.array([len(tokenised.ids[i]) for i in mentions], dtype=np.int64)
    ids = np.full((len(mentions), int(lengths.max())), PAD_ID, dtype=np.int64)
    for row, mention in enumerate(mentions):
        ids[row, : lengths[row]] = tokenised.ids[mention]
    return TokenBatch(
        ids=torch.from_numpy(ids),
        lengths=torch.from_numpy(lengths),
        first=torch.from_numpy(tokenised.first[mentions]),
        last=torch.from_numpy(tokenised.last[mentions]),
        mentions=mentions,
        has_bos=tokenised.has_bos,
    )
