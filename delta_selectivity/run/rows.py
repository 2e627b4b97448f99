"""Map texts to rows of activations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from delta_selectivity.tasks import TokenisedMentions


@dataclass(frozen=True)
class RowTable:
    """The rows of each mention: one for `last` and `mean`, one per name token for `all`."""

    positions: str  # last, mean, all
    start: np.ndarray  # int64 [mentions + 1]; mention m has rows start[m] .. start[m + 1] - 1
    mention: np.ndarray  # int64 [rows]
    weight: np.ndarray  # float32 [rows], sums to 1 over a mention's rows
    token: np.ndarray  # int64 [rows], the token type at the row's position; for `mean`, that of the name's last token

    @classmethod
    def build(cls, tokenised: TokenisedMentions, positions: str) -> RowTable:
        """Build the rows in the order of the mentions."""
        length = tokenised.last - tokenised.first + 1
        count = length if positions == "all" else np.ones_like(length)
        mention = np.repeat(np.arange(len(count)), count)
        first = tokenised.first if positions == "all" else tokenised.last
        token = np.concatenate([ids[a : b + 1] for ids, a, b in zip(tokenised.ids, first, tokenised.last, strict=True)])
        start = np.concatenate([[0], np.cumsum(count)])
        return cls(positions, start, mention, (1 / count[mention]).astype(np.float32), token.astype(np.int64))

    def __len__(self) -> int:
        return len(self.mention)

    def count(self, mentions: np.ndarray) -> np.ndarray:
        """Return the number of rows of each mention: int64 [mentions]."""
        return self.start[mentions + 1] - self.start[mentions]

    def ids_of(self, mentions: np.ndarray) -> np.ndarray:
        """Return the row ids of the mentions, mention by mention: int64."""
        if self.positions != "all":
            return mentions
        return np.concatenate([np.arange(self.start[m], self.start[m + 1]) for m in mentions])
