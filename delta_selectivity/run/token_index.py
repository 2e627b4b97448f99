"""Positions of the probed tokens of a batch, and the tokens that an SAE encodes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from delta_selectivity.run.rows import RowTable
from delta_selectivity.run.token_sample import TokenSample
from delta_selectivity.saes import SparseRows
from delta_selectivity.tasks import TokenBatch


@dataclass(frozen=True)
class Encoded:
    """Which of a batch's real tokens an SAE encodes."""

    rows: Tensor | None  # int64 [encoded], among the real tokens; None: all of them
    probed: Tensor  # int64 [probed]: the name tokens among the encoded ones
    whole: Tensor | None  # int64: those of the encoded ones that count in the whole-text figures; None: all of them


@dataclass(frozen=True)
class TokenIndex:
    """Places of a batch's tokens. Made on the CPU, so that nothing waits for the device."""

    mention: Tensor  # int64 [real]: whose token it is
    probed: Tensor  # int64 [probed]: the name tokens among the real ones
    with_bos: Encoded  # for SAEs in whose figures BOS counts
    without_bos: Encoded  # for the others
    offsets: Tensor | None  # int64 [rows]: first name token of each row; None: each name token is a row
    row_ids: Tensor  # int64 [rows], stays on the CPU

    @classmethod
    def build(cls, batch: TokenBatch, rows: RowTable, skip: int, sample: TokenSample | None) -> TokenIndex:
        """skip: tokens that each text lost at its beginning: the BOS that does not count."""
        n_texts, kept = len(batch.lengths), batch.lengths - skip
        kept_before = torch.cumsum(kept, 0) - kept  # real tokens of earlier texts
        first = batch.last if rows.positions == "last" else batch.first
        n_probed = batch.last - first + 1
        starts = torch.cumsum(n_probed, 0) - n_probed
        text = torch.repeat_interleave(torch.arange(n_texts), n_probed)
        in_text = first[text] + torch.arange(len(text)) - starts[text]
        probed = kept_before[text] + in_text - skip
        counted = torch.ones(int(kept.sum()), dtype=torch.bool)
        drawn = None if sample is None else sample.of(batch, skip)
        with_bos = _encoded(counted, drawn, probed)
        if batch.has_bos and not skip:
            counted[kept_before] = False
        return cls(
            mention=torch.from_numpy(batch.mentions).repeat_interleave(kept),
            probed=probed,
            with_bos=with_bos,
            without_bos=_encoded(counted, drawn, probed),
            offsets=starts if rows.positions == "mean" else None,
            row_ids=torch.from_numpy(rows.of(batch.mentions)),
        )

    def to(self, device: torch.device) -> TokenIndex:
        """The same on a device, but for the row ids."""
        if device.type == "cpu":
            return self
        moved = {
            field.name: _moved(getattr(self, field.name), device) for field in fields(self) if field.name != "row_ids"
        }
        return replace(self, **moved)  # type: ignore[arg-type]

    def pool(self, probed: Tensor) -> Tensor:
        """Average the rows at the name tokens over each name, if that is a row: ``[rows, d]``."""
        if self.offsets is None:
            return probed
        return embedding_bag(torch.arange(len(probed), device=probed.device), probed, self.offsets, mode="mean")

    def pool_codes(self, latents: SparseRows) -> SparseRows:
        """Codes of the name tokens, or their mean over each name, as the SAE gives them.

        What the decoder multiplies and adds to undo a normalisation of the input is no part of a code.
        """
        latents = replace(latents, scale=None, shift=None)
        return latents if self.offsets is None else latents.means(self.offsets)


def _encoded(counted: Tensor, drawn: Tensor | None, probed: Tensor) -> Encoded:
    """The tokens that count and, of a sample, were drawn; and the probed ones.

    counted, drawn: bool [real].
    """
    if drawn is None:
        if bool(counted.all()):
            return Encoded(None, probed, None)
        needed, whole = counted, None
    else:
        whole = counted & drawn
        needed = whole.clone()
        needed[probed] = True
    place = needed.cumsum(0) - 1
    return Encoded(needed.nonzero()[:, 0], place[probed], None if whole is None else place[whole])


def _moved(value: Tensor | Encoded | None, device: torch.device) -> Tensor | Encoded | None:
    if isinstance(value, Encoded):
        parts = (_moved(getattr(value, field.name), device) for field in fields(value))
        return Encoded(*parts)  # type: ignore[arg-type]
    return value if value is None else value.to(device, non_blocking=True)
