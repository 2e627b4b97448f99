"""The tokens of a batch whose activations are needed: those of names, and those of the sample that SAEs encode."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
    """The needed tokens of a batch that an SAE encodes."""

    rows: Tensor | None  # int64 [encoded], their indices among the needed tokens; None: all of them
    probed: Tensor  # int64 [probed], indices of the name tokens among the encoded ones
    whole: Mapping[int, Tensor | None]  # limit -> bool [encoded], whether a token is in the sample; None: all are
    n_counted: int  # tokens from which the samples are drawn


@dataclass(frozen=True)
class TokenIndex:
    """Positions of the tokens of a batch that are needed, built on the CPU so that nothing waits for the device."""

    wanted: Tensor  # bool [texts, tokens], whether a token is needed; stays on the CPU
    mention: Tensor  # int64 [needed], the token's mention
    number: Tensor  # int64 [needed], unique among the tokens of all texts
    probed: Tensor  # int64 [probed], indices of the name tokens among the needed ones
    encoded: Mapping[bool, Encoded]  # for SAEs whose figures include BOS, for the others; only those of the run
    offsets: Tensor | None  # int64 [rows], first name token of each row; None: each name token is a row
    row_ids: Tensor  # int64 [rows], stays on the CPU

    @classmethod
    def build(
        cls,
        batch: TokenBatch,
        rows: RowTable,
        counts_bos: Collection[bool],
        sample: TokenSample,
        limits: Sequence[int],
    ) -> TokenIndex:
        """Build the index.

        counts_bos: whether the figures of the run's SAEs include BOS.
        limits: limits of the token sample to draw.
        """
        lengths = batch.lengths
        starts = torch.cumsum(lengths, 0) - lengths  # real tokens of earlier texts
        text = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # [real], as all masks below
        place = torch.arange(len(text)) - starts[text]
        first = batch.last if rows.positions == "last" else batch.first
        n_probed = batch.last - first + 1
        name_starts = torch.cumsum(n_probed, 0) - n_probed
        of_name = torch.repeat_interleave(torch.arange(len(lengths)), n_probed)
        probed = (starts + first - name_starts)[of_name] + torch.arange(len(of_name))
        ordinary = place >= int(batch.has_bos)
        every = torch.ones_like(ordinary)
        drawn = {}
        if list(limits) != [ALL]:
            numbers = sample.numbers(batch)
            drawn = {limit: torch.from_numpy(numbers < np.uint64(limit)) for limit in limits if limit != ALL}
        taken = {
            with_bos: {limit: drawn.get(limit, every) & (every if with_bos else ordinary) for limit in limits}
            for with_bos in counts_bos
        }
        needed = torch.stack([mask for masks in taken.values() for mask in masks.values()]).any(dim=0)
        needed[probed] = True
        probed = (needed.cumsum(0) - 1)[probed]
        text, place, ordinary = text[needed], place[needed], ordinary[needed]
        wanted = torch.zeros(batch.ids.shape, dtype=torch.bool)
        wanted[text, place] = True
        mention = torch.from_numpy(batch.mentions)[text]
        n_real = int(lengths.sum())
        return cls(
            wanted=wanted,
            mention=mention,
            number=place + mention * MAX_TOKENS,
            probed=probed,
            encoded={
                with_bos: _encoded(
                    {limit: mask[needed] for limit, mask in masks.items()},
                    probed,
                    n_real - (0 if with_bos or not batch.has_bos else len(lengths)),
                )
                for with_bos, masks in taken.items()
            },
            offsets=name_starts if rows.positions == "mean" else None,
            row_ids=torch.from_numpy(rows.ids_of(batch.mentions)),
        )

    def to(self, device: torch.device) -> TokenIndex:
        """Move the index to a device, except what stays on the CPU."""
        if device.type == "cpu":
            return self
        moved = {
            field.name: _to_device(getattr(self, field.name), device)
            for field in fields(self)
            if field.name not in ("wanted", "row_ids")
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


def _encoded(taken: Mapping[int, Tensor], probed: Tensor, n_counted: int) -> Encoded:
    """Return the tokens to encode: those in the sample of any limit, and probed tokens.

    taken: limit -> bool [needed]; probed: indices among the needed tokens; n_counted: as in `Encoded`.
    """
    encoded = torch.stack([*taken.values()]).any(dim=0)
    encoded[probed] = True
    place = encoded.cumsum(0) - 1
    whole = {limit: None if bool((some == encoded).all()) else some[encoded] for limit, some in taken.items()}
    rows = None if bool(encoded.all()) else encoded.nonzero()[:, 0]
    return Encoded(rows, place[probed], whole, n_counted)


def _to_device(value: Any, device: torch.device) -> Any:
    """Move a tensor, or an object that holds tensors, to a device."""
    if isinstance(value, Encoded):
        return Encoded(*(_to_device(getattr(value, field.name), device) for field in fields(value)))
    if isinstance(value, Mapping):
        return {name: _to_device(part, device) for name, part in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
