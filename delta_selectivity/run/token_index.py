"""Positions of the probed tokens of a batch, and the tokens that an SAE encodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from delta_selectivity.run.reconstruction import ALL
from delta_selectivity.run.rows import RowTable
from delta_selectivity.run.token_sample import TokenSample
from delta_selectivity.saes import SparseRows
from delta_selectivity.tasks import TokenBatch

MAX_TOKENS = 2**32
"""Upper limit of the number of tokens in a text, to number the tokens of all texts."""


@dataclass(frozen=True)
class Encoded:
    """The real tokens of a batch that an SAE encodes."""

    rows: Tensor | None  # int64 [encoded], their indices among the real tokens; None: all of them
    probed: Tensor  # int64 [probed], indices of the name tokens among the encoded ones
    whole: Mapping[
        int, Tensor | None
    ]  # limit -> int64, indices of the sample among the encoded ones; None: all of them
    n_counted: int  # tokens from which the samples are drawn


@dataclass(frozen=True)
class TokenIndex:
    """Positions of a batch's tokens, built on the CPU so that nothing waits for the device."""

    mention: Tensor  # int64 [real], the token's mention
    number: Tensor  # int64 [real], unique among the tokens of all texts
    probed: Tensor  # int64 [probed], indices of the name tokens among the real ones
    with_bos: Encoded  # for SAEs whose figures include BOS
    without_bos: Encoded  # for the others
    offsets: Tensor | None  # int64 [rows], first name token of each row; None: each name token is a row
    row_ids: Tensor  # int64 [rows], stays on the CPU

    @classmethod
    def build(
        cls, batch: TokenBatch, rows: RowTable, skip: int, sample: TokenSample, limits: Sequence[int]
    ) -> TokenIndex:
        """Build the index.

        skip: number of tokens removed from each text's start (1 for a BOS that does not count).
        limits: limits of the token sample to draw.
        """
        n_texts, kept = len(batch.lengths), batch.lengths - skip
        kept_before = torch.cumsum(kept, 0) - kept  # real tokens of earlier texts
        first = batch.last if rows.positions == "last" else batch.first
        n_probed = batch.last - first + 1
        starts = torch.cumsum(n_probed, 0) - n_probed
        text = torch.repeat_interleave(torch.arange(n_texts), n_probed)
        in_text = first[text] + torch.arange(len(text)) - starts[text]
        probed = kept_before[text] + in_text - skip
        mention = torch.from_numpy(batch.mentions).repeat_interleave(kept)
        place = torch.arange(len(mention)) - kept_before.repeat_interleave(kept) + skip
        counted = torch.ones(int(kept.sum()), dtype=torch.bool)
        numbers = None if list(limits) == [ALL] else sample.numbers(batch, skip)
        drawn = {
            limit: None if limit == ALL or numbers is None else torch.from_numpy(numbers < np.uint64(limit))
            for limit in limits
        }
        with_bos = _encoded(counted, drawn, probed)
        if batch.has_bos and not skip:
            counted[kept_before] = False
        return cls(
            mention=mention,
            number=place + mention * MAX_TOKENS,
            probed=probed,
            with_bos=with_bos,
            without_bos=_encoded(counted, drawn, probed),
            offsets=starts if rows.positions == "mean" else None,
            row_ids=torch.from_numpy(rows.ids_of(batch.mentions)),
        )

    def to(self, device: torch.device) -> TokenIndex:
        """Move the index to a device, except the row ids."""
        if device.type == "cpu":
            return self
        moved = {
            field.name: _to_device(getattr(self, field.name), device)
            for field in fields(self)
            if field.name != "row_ids"
        }
        return replace(self, **moved)

    def pool(self, probed: Tensor) -> Tensor:
        """Return the rows of the name tokens, or their mean over each name: ``[rows, d]``."""
        if self.offsets is None:
            return probed
        return embedding_bag(torch.arange(len(probed), device=probed.device), probed, self.offsets, mode="mean")

    def pool_codes(self, latents: SparseRows) -> SparseRows:
        """Return the SAE's codes of the name tokens, or their mean over each name.

        The codes are without the scale and shift that invert the input normalisation in the decoder.
        """
        latents = replace(latents, scale=None, shift=None)
        return latents if self.offsets is None else latents.means(self.offsets)


def _encoded(counted: Tensor, drawn: Mapping[int, Tensor | None], probed: Tensor) -> Encoded:
    """Return the tokens to encode: counted tokens in the sample of any limit, and probed tokens.

    counted: bool [real]; drawn: limit -> bool [real], None if it draws all.
    """
    n_counted = int(counted.sum())
    if n_counted == len(counted) and None in drawn.values():
        return Encoded(None, probed, {limit: _places(some) for limit, some in drawn.items()}, n_counted)
    taken = {limit: counted if some is None else counted & some for limit, some in drawn.items()}
    needed = torch.stack([*taken.values()]).any(dim=0)
    needed[probed] = True
    place = needed.cumsum(0) - 1
    places = {limit: None if bool((some == needed).all()) else place[some] for limit, some in taken.items()}
    return Encoded(needed.nonzero()[:, 0], place[probed], places, n_counted)


def _places(some: Tensor | None) -> Tensor | None:
    return None if some is None else some.nonzero()[:, 0]


def _to_device(value: Any, device: torch.device) -> Any:
    """Move a tensor, or an object that holds tensors, to a device."""
    if isinstance(value, Encoded):
        return Encoded(*(_to_device(getattr(value, field.name), device) for field in fields(value)))
    if isinstance(value, Mapping):
        return {name: _to_device(part, device) for name, part in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
