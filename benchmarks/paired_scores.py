"""Compare two SAEs on the same rows and folds: the difference of their scores, its interval, and significant pairs.

Every method in a table uses the same estimator. A score is a mean over probes of a contribution of each row, so two
SAEs are compared row by row, clustered by person (`uncertainty.py`). FVU is a ratio of two sums over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.probing.probe_statistics import ProbeScores
from delta_selectivity.probing.uncertainty import Cell, Estimate, balanced_mean, clustered_variance, estimate_mean

Floats = NDArray[np.floating]
Parts = Callable[[ProbeScores, str], Floats]  # [repeats, rows]; its balanced mean is the score: `correct`, `bits`, ...

RELIABLE = 1.96 * 2**0.5  # 2.77: two runs of one SAE differ by more than this times their SD in 5 % of cases


@dataclass(frozen=True)
class Errors:
    """Squared errors of a reconstruction, summed in units that may be rows or texts."""

    error: Floats  # [units], squared
    deviation: Floats  # [units], squared distance from the mean of all rows
    clusters: NDArray[np.int64]  # [units], the person or the text of each

    @property
    def fvu(self) -> float:
        """Return the fraction of variance unexplained."""
        return float(self.error.sum() / self.deviation.sum())

    def of(self, units: NDArray[np.int64]) -> Errors:
        """Select units, possibly repeated."""
        return Errors(self.error[units], self.deviation[units], self.clusters[units])


@dataclass(frozen=True)
class PairCount:
    """Numbers of pairs by how a score orders them, when the better SAE is known."""

    pairs: int
    right: int  # the better one has the better score
    sure: int  # correct, and the 95 % interval of the difference excludes 0
    sure_and_wrong: int  # wrong, and the interval excludes 0
    beyond_noise: int  # correct, and by more than `RELIABLE` times the SD over runs: visible in single runs of both

    @classmethod
    def of(cls, gains: Sequence[Sequence[float]], noise: float) -> PairCount:
        """Count pairs.

        Args:
            gains: The better one's score minus the worse one's, with the interval: (value, low, high) each.
            noise: The SD of one SAE's score over runs.
        """
        return cls(
            pairs=len(gains),
            right=sum(value > 0 for value, _, _ in gains),
            sure=sum(low > 0 for _, low, _ in gains),
            sure_and_wrong=sum(high < 0 for _, _, high in gains),
            beyond_noise=sum(value > RELIABLE * noise for value, _, _ in gains),
        )


def by_partition(probes: Sequence[ProbeScores], view: str, parts: Parts) -> Floats:
    """Return the mean over probes of a view's score, [repeats]; a run reports the mean of these."""
    return np.mean([balanced_mean(parts(probe, view), probe.labels, probe.weights) for probe in probes], axis=0)


def difference(
    a: Sequence[Floats], b: Sequence[Floats], rows: Sequence[ProbeScores], level_varies: bool = False
) -> Estimate:
    """Return the mean over probes of a's score minus b's, paired row by row and clustered by person over all probes.

    a, b: the result of `Parts` for each probe, [repeats, rows] each; rows: the probes themselves, of either SAE;
    level_varies: as in `Cell`.
    """
    return estimate_mean(
        [
            Cell(of_a - of_b, probe.labels, probe.persons, probe.weights, level_varies=level_varies)
            for of_a, of_b, probe in zip(a, b, rows, strict=True)
        ]
    )


def fvu_difference(a: Errors, b: Errors) -> Estimate:
    """Return a's FVU minus b's on the same rows, with the clustered, linearised error of a ratio of sums."""
    value = a.fvu - b.fvu
    psi = (a.error - b.error - value * a.deviation) / a.deviation.sum()
    return Estimate(value, clustered_variance(psi, a.clusters) ** 0.5, len(np.unique(a.clusters)) - 1)


def noise_of_runs(runs: Mapping[str, Sequence[float]]) -> float:
    """Return the SD of a score over repeated runs, pooled over SAEs: {SAE: its score in each run}."""
    return float(np.sqrt(np.mean([np.var(scores, ddof=1) for scores in runs.values()])))


def noise_of_folds(partitions: Sequence[Floats]) -> float:
    """Return the SD of a run's score over seeds of its folds, from the spread over the partitions of each SAE."""
    return float(np.sqrt(np.mean([np.var(scores, ddof=1) / len(scores) for scores in partitions])))


def noise_of_differences(runs: Mapping[str, Sequence[float]]) -> float:
    """Return the SD over runs of the difference of two SAEs in the same run, pooled over all pairs of SAEs."""
    scores = np.array(list(runs.values()))  # [saes, runs]
    pairs = [(i, j) for i in range(len(scores)) for j in range(i)]
    return float(np.sqrt(np.mean([np.var(scores[i] - scores[j], ddof=1) for i, j in pairs])))
