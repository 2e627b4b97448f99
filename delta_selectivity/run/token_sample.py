"""A seeded sample of the tokens that count in the whole-text figures.

    sample = TokenSample.draw(tokenised, texts, n_tokens=65_536, seed=0)
    sample.limits[dataset]             # the dataset's sample: tokens whose number is below this limit
    sample.numbers(batch)              # the number of each real token of the batch

In a wide SAE, most arithmetic is for tokens that only the whole-text figures need. A token's number is a hash of its
text, its position and the seed, so the sample of a dataset is the same for every SAE and every combination of datasets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from delta_selectivity.run.reconstruction import ALL
from delta_selectivity.tasks import ProbeTexts, TokenBatch, TokenisedMentions

_GOLDEN, _MIX1, _MIX2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class TokenSample:
    """A sample of the tokens of each dataset."""

    hashes: npt.NDArray[np.uint64]  # [mentions], of the mention's text and the seed
    limits: tuple[int, ...]  # for each dataset: its tokens are those with numbers below the limit; `ALL`: every token

    @classmethod
    def draw(cls, tokenised: TokenisedMentions, texts: ProbeTexts, n_tokens: int | None, seed: int) -> TokenSample:
        """Draw about `n_tokens` of each dataset's tokens; all if it has no more, or if `n_tokens` is None."""
        length = np.array([len(ids) - tokenised.has_bos for ids in tokenised.ids], dtype=np.int64)  # without BOS
        limits = []
        for dataset in texts.datasets:
            mentions = np.unique(np.concatenate([probe.mentions for probe in dataset.probes]))
            n = int(length[mentions].sum())
            limits.append(ALL if n_tokens is None or n_tokens >= n else n_tokens * ALL // n)
        key = seed_key(seed)
        digests = (blake2b(ids.tobytes(), digest_size=8, key=key).digest() for ids in tokenised.ids)
        hashes = np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)
        return cls(hashes, tuple(limits))

    def limits_of(self, datasets: Iterable[int]) -> tuple[int, ...]:
        """Return the distinct limits of some datasets, the lowest first."""
        return tuple(sorted({self.limits[index] for index in datasets}))

    def texts(self, mentions: npt.NDArray[np.int64], dataset: int) -> npt.NDArray[np.int64]:
        """Return the mentions of a dataset whose whole texts are drawn, about `n_tokens` tokens in all."""
        limit = self.limits[dataset]
        return mentions if limit == ALL else mentions[self.hashes[mentions] < np.uint64(limit)]

    def numbers(self, batch: TokenBatch) -> npt.NDArray[np.uint64]:
        """Return the number of each real token of a batch, text by text."""
        n = batch.lengths.numpy()
        place = (np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)).astype(np.uint64)
        return _mix_bits(np.repeat(self.hashes[batch.mentions], n) + place * _GOLDEN)


def seed_key(seed: int) -> bytes:
    """Return a key for blake2b, which is at most 64 bytes: the last digits of the seed."""
    return str(seed).encode()[-64:]


def _mix_bits(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return uniform 64-bit numbers by the finaliser of SplitMix64 (Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))
