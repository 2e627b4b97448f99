"""A seeded sample of the tokens that count in the whole-text figures.

    sample = TokenSample.draw(tokenised, texts, n_tokens=65_536, seed=0)
    sample.of(batch, skip=1)           # bool, for each real token of the batch

In a wide SAE most arithmetic goes into the tokens that only the whole-text figures need.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from delta_selectivity.tasks import ProbeTexts, TokenBatch, TokenisedMentions

_GOLDEN, _MIX1, _MIX2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class TokenSample:
    """Which tokens were drawn: each by the hash of its text, its place in it and the seed."""

    hashes: npt.NDArray[np.uint64]  # [mentions], of text and seed
    limit: np.uint64  # a token whose number is below it is drawn

    @classmethod
    def draw(
        cls, tokenised: TokenisedMentions, texts: ProbeTexts, n_tokens: int | None, seed: int
    ) -> TokenSample | None:
        """Draw so that each dataset has about `n_tokens` or more; None if that takes all of some dataset's tokens."""
        if n_tokens is None:
            return None
        length = np.array([len(ids) for ids in tokenised.ids], dtype=np.int64)
        mentions = [np.unique(np.concatenate([p.mentions for p in dataset.probes])) for dataset in texts.datasets]
        share = n_tokens / min(int(length[of_dataset].sum()) for of_dataset in mentions)
        if share >= 1:
            return None
        key = seed_key(seed)
        digests = (blake2b(ids.tobytes(), digest_size=8, key=key).digest() for ids in tokenised.ids)
        hashes = np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)
        return cls(hashes, np.uint64(share * 2.0**64))

    def of(self, batch: TokenBatch, skip: int) -> Tensor:
        """Return for each real token of a batch, text by text, whether it was drawn: bool [tokens].

        skip: tokens that each text lost at its beginning.
        """
        kept = (batch.lengths - skip).numpy()
        start = np.repeat(np.cumsum(kept) - kept, kept)
        place = (np.arange(len(start)) - start + skip).astype(np.uint64)
        return torch.from_numpy(_mixed(np.repeat(self.hashes[batch.mentions], kept) + place * _GOLDEN) < self.limit)


def seed_key(seed: int) -> bytes:
    """Return a seed as a key of blake2b, which takes 64 bytes: its last digits."""
    return str(seed).encode()[-64:]


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Uniform 64-bit numbers: the finaliser of SplitMix64 (Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))
