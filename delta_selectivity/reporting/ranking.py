"""Rank SAEs by transfer_r2; SAEs that do not differ significantly are tied.

ranking = rank(study_of(files))
ranking.place(sae)                       # "1", or "1-2" if it is tied with another SAE
ranking.sentence()                       # how many pairs differ significantly, and which do not

The score is transfer_r2; docs/reliability.md describes how well it orders SAEs, and where it fails. Two SAEs differ
significantly if the 95 % interval of their paired difference, on the same rows, folds and people, excludes 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from delta_selectivity.reporting.names import short_names
from delta_selectivity.reporting.study import Sae, Study

MAX_NAME = 40  # characters of a name in the sentence
MAX_PAIRS = 3  # pairs, for a readable sentence
MEANING = (
    "survives: transfer_r2, the R2 between the outputs of the model's own probes on the reconstruction and on the\n"
    "activations; 1 = identical, 0 or less = no better than a constant\n"
    "rank: by transfer_r2; 1-2 = tied with another SAE (the 95 % interval of the paired difference includes 0)"
)
"""Legend of the columns `survives` and `rank`."""


@dataclass(frozen=True)
class Pair:
    """Two comparable SAEs, first the one with the higher score over the cells that both have."""

    one: Sae
    other: Sae
    is_significant: bool  # whether the difference is significant


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
        names = dict(zip(labels, short_names(labels, MAX_NAME), strict=True))
        best, worst = (f"{names[sae.label]} ({sae.rank_key()[0]:.3f})" for sae in (self.order[0], self.order[-1]))
        extremes = f"transfer_r2 is highest for {best} and lowest for {worst}. "
        return f"{extremes if self.is_total_order else ''}{self._significant_pairs(names)}"

    @property
    def is_total_order(self) -> bool:
        """Return whether all pairs of the SAEs are comparable, in the order of their means."""
        means = [sae.rank_key() for sae in self.order]
        return len(self.pairs) == len(means) * (len(means) - 1) / 2 and means == sorted(means, reverse=True)

    def _significant_pairs(self, names: Mapping[str, str]) -> str:
        ties = [pair for pair in self.pairs if not pair.is_significant]
        n, of = len(self.pairs) - len(ties), len(self.pairs)
        if not ties:
            return f"{'The two SAEs' if of == 1 else f'All {of} pairs of SAEs'} differ significantly."
        if n == 0:
            tied = "The two SAEs do not differ" if of == 1 else f"None of the {of} pairs of SAEs differs"
            return f"{tied} significantly: the order may be due to chance."
        listed = [f"{names[pair.one.label]} and {names[pair.other.label]}" for pair in ties[:MAX_PAIRS]]
        more = f"; and {len(ties) - MAX_PAIRS} more" if len(ties) > MAX_PAIRS else ""
        return f"{n} of {of} pairs of SAEs differ significantly. The others are {'; '.join(listed)}{more}."


def rank(study: Study) -> Ranking:
    """Rank all SAEs that have scores, in groups of comparable ones."""
    pairs: list[Pair] = []
    for one, other in (pair for group in study.comparable for pair in itertools.combinations(group, 2)):
        comparison = study.comparison(one.name, other.name)
        figures = {} if comparison is None else comparison.figures
        low, high = (figures.get(f"transfer_r2_ci_{end}") for end in ("low", "high"))
        if low is not None and high is not None:
            better, worse = (
                (one, other) if figures["transfer_r2"] >= 0 else (other, one)
            )  # over the cells that both have
            pairs.append(Pair(better, worse, low > 0 or high < 0))
    order = (sae for group in study.comparable for sae in sorted(group, key=lambda sae: _places(sae, pairs)[0]))
    return Ranking(tuple(order), tuple(pairs))


def _places(sae: Sae, pairs: Sequence[Pair]) -> tuple[int, int]:
    """Return the first and the last possible rank of an SAE."""
    pairs_of_sae = [pair for pair in pairs if sae is pair.one or sae is pair.other]
    first = 1 + sum(pair.is_significant and pair.other is sae for pair in pairs_of_sae)
    return first, 1 + len(pairs_of_sae) - sum(pair.is_significant and pair.one is sae for pair in pairs_of_sae)


def in_order(study: Study, ranking: Ranking) -> Sequence[Sae]:
    """Return all SAEs by rank, then those without a score, then the baselines."""
    ranked = {sae.name for sae in ranking.order}
    rest = [sae for sae in study.saes if sae.name not in ranked]
    return [*ranking.order, *rest, *study.baselines]
