"""Rank SAEs by how much survives of what the model's own probes read; SAEs without significant differences are tied.

ranking = rank(study_of(files))
ranking.place(sae)                       # "1", or "1-2" if another one may be as good or better
ranking.sentence()                       # how many pairs differ significantly, and which do not

The score is transfer_r2; docs/reliability.md describes how well it orders SAEs, and where it fails. Two SAEs differ
significantly if the 95 % interval of their paired difference, on the same rows, folds and people, excludes 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from delta_selectivity.reporting.names import apart
from delta_selectivity.reporting.study import Sae, Study

LONGEST = 40  # characters of a name in the sentence
NAMED = 3  # pairs, for a readable sentence
MEANING = (
    "survives: transfer_r2, the share of what the model's own probes read in its activations that they still read in\n"
    "the reconstruction; 1 = all of it, 0 or less = no more than a constant\n"
    "rank: by what survives; 1-2 = not told apart from another (the 95 % interval of the paired difference holds 0)"
)
"""Definition of the columns."""


@dataclass(frozen=True)
class Pair:
    """Two comparable SAEs, first the one with the higher score over the cells that both have."""

    one: Sae
    other: Sae
    sure: bool  # whether the difference is significant


@dataclass(frozen=True)
class Ranking:
    """The SAEs of a report and every comparable pair of them."""

    order: tuple[Sae, ...]  # comparable SAEs side by side, best first
    pairs: tuple[Pair, ...]

    def place(self, sae: Sae) -> str:
        """Return the possible ranks of an SAE among those comparable with it; a dash if there are none."""
        first, last = _places(sae, self.pairs)
        if not any(sae is pair.one or sae is pair.other for pair in self.pairs):
            return "-"
        return str(first) if first == last else f"{first}-{last}"

    def sentence(self) -> str | None:
        """Return the best and the worst SAE and the number of significant pairs as text; None if there are no pairs."""
        if not self.pairs:
            return None
        labels = [sae.label for sae in self.order]
        names = dict(zip(labels, apart(labels, LONGEST), strict=True))
        best, worst = (f"{names[sae.label]} ({sae.merit()[0]:.3f})" for sae in (self.order[0], self.order[-1]))
        whole = f"What the model's own probes read survives best in {best}, least in {worst}. "
        return f"{whole if self.is_whole else ''}{self._told_apart(names)}"

    @property
    def is_whole(self) -> bool:
        """Return whether all pairs of the SAEs are comparable, in the order of their means."""
        means = [sae.merit() for sae in self.order]
        return len(self.pairs) == len(means) * (len(means) - 1) / 2 and means == sorted(means, reverse=True)

    def _told_apart(self, names: Mapping[str, str]) -> str:
        open_ = [pair for pair in self.pairs if not pair.sure]
        n, of = len(self.pairs) - len(open_), len(self.pairs)
        if not open_:
            return f"These data tell {'the two' if of == 1 else f'all {of} pairs of'} SAEs apart."
        if n == 0:
            told = "these two SAEs" if of == 1 else f"any of the {of} pairs of SAEs"
            return f"These data cannot tell {told} apart: which of them ranks higher may be chance."
        listed = [f"{names[pair.one.label]} and {names[pair.other.label]}" for pair in open_[:NAMED]]
        more = f", and {len(open_) - NAMED} more" if len(open_) > NAMED else ""
        return f"These data tell {n} of {of} pairs of SAEs apart; not {'; '.join(listed)}{more}."


def rank(study: Study) -> Ranking:
    """Rank all SAEs that have scores, in groups of comparable ones."""
    pairs: list[Pair] = []
    for one, other in (pair for group in study.comparable for pair in itertools.combinations(group, 2)):
        comparison = study.comparison(one.name, other.name)
        found = {} if comparison is None else comparison.found
        low, high = (found.get(f"transfer_r2_ci_{end}") for end in ("low", "high"))
        if low is not None and high is not None:
            better, worse = (one, other) if found["transfer_r2"] >= 0 else (other, one)  # over the cells that both have
            pairs.append(Pair(better, worse, low > 0 or high < 0))
    order = (sae for group in study.comparable for sae in sorted(group, key=lambda sae: _places(sae, pairs)[0]))
    return Ranking(tuple(order), tuple(pairs))


def _places(sae: Sae, pairs: Sequence[Pair]) -> tuple[int, int]:
    """Return the first and the last possible rank of an SAE."""
    own = [pair for pair in pairs if sae is pair.one or sae is pair.other]
    first = 1 + sum(pair.sure and pair.other is sae for pair in own)
    return first, 1 + len(own) - sum(pair.sure and pair.one is sae for pair in own)


def in_order(study: Study, ranking: Ranking) -> Sequence[Sae]:
    """Return all SAEs by rank, then those without a score, then the baselines."""
    ranked = {sae.name for sae in ranking.order}
    rest = [sae for sae in study.saes if sae.name not in ranked]
    return [*ranking.order, *rest, *study.baselines]
