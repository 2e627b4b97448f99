"""Person-clustered standard errors, intervals, p and q values of differences of selectivity.

    estimate = estimate_delta(change, labels, persons)    # change [repeats, rows], correct_sae - correct_model
    overall = estimate_mean([Cell(change, labels, persons), ...])    # over layers and probes of the same people
    q = benjamini_hochberg([estimate.p_value, 0.2, None])

The rows of one person are not independent, so a person's rows are summed before they are squared (Liang & Zeger
1986). With 5 to 10 mentions per person, tests by row reject 10 to 17 % of true nulls, these tests 4 to 5 %. If people
are few or of unequal size, sums of squares are biased downwards and noisy; `_correction` and `_freedom` account for
that (after Bell & McCaffrey 2002, and Imbens & Kolesar 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

Floats = NDArray[np.floating]
Numbers = NDArray[np.floating] | NDArray[np.int8]


POWER = 0.8  # of `Estimate.detectable`
_CORRELATION = 0.5  # working correlation of a person's rows; with 0.2, intervals of Zipf-sized people are too narrow
_PRIOR_PEOPLE = 20  # effective people at which a person's own square and the pooled estimate have equal weight


@dataclass(frozen=True)
class Estimate:
    """A difference with its uncertainty: Student's t with `degrees_of_freedom` around `value`.

    A standard error of 0 means that no row changed: both ends of the interval equal the value, and p is 1 if the value
    is 0, else 0.
    """

    value: float
    standard_error: float
    degrees_of_freedom: float

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return the ends of the confidence interval with this coverage probability."""
        half = self._quantile((1 + confidence) / 2) * self.standard_error if self.standard_error else 0.0
        return self.value - half, self.value + half

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.interval(0.95)[0]

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.interval(0.95)[1]

    @property
    def p_value(self) -> float:
        """Two-sided p value of the hypothesis of no difference."""
        if self.standard_error == 0:
            return 1.0 if self.value == 0 else 0.0
        return float(2 * stdtr(self.degrees_of_freedom, -abs(self.value) / self.standard_error))

    @property
    def detectable(self) -> float:
        """The smallest true difference that is detected at p < 0.05 with 80 % power."""
        return (self._quantile(0.975) + self._quantile(POWER)) * self.standard_error if self.standard_error else 0.0

    def within(self, epsilon: float) -> bool:
        """Return whether the 90 % interval lies within +-epsilon: equivalence at level 0.05 (two one-sided tests)."""
        low, high = self.interval(0.9)
        return -epsilon <= low and high <= epsilon

    def _quantile(self, probability: float) -> float:
        return float(stdtrit(self.degrees_of_freedom, probability))


@dataclass(frozen=True)
class Cell:
    """The change between two views, or two SAEs, in one (layer, probe)."""

    change: Numbers  # [repeats, rows], such as correct_sae - correct_model, for each partition into folds
    labels: NDArray[np.bool_]  # [rows]
    persons: NDArray[np.int64]  # [rows]; one id means one person in all cells
    weights: Floats | None = None  # [rows]; None: 1 each
    n_folds: int = 5  # of each partition
    level_varies: bool = False  # whether the probes' C moves the change of all rows together (see `level_variance`)


def balanced_mean(
    values: Floats | NDArray[np.int8], labels: NDArray[np.bool_], weights: Floats | None = None
) -> Floats:
    """Return the mean over both classes of the class's (weighted) mean: [..., rows] -> [...], float64.

    For 0/1 correctness this is balanced accuracy. Raises ValueError if a class has no weight.
    """
    return np.asarray(0.5 * sum(values.astype(np.float64) @ share for share in _class_shares(labels, weights)))


def effective_people(persons: NDArray[np.integer], weights: Floats | None = None) -> float:
    """Return the effective number of people, (sum of w)^2 / sum of w^2 (Kish 1965).

    w is a person's number of rows, or the sum of their weights.
    """
    _, person = np.unique(persons, return_inverse=True)
    sizes = np.bincount(person, weights)
    return float(sizes.sum() ** 2 / (sizes @ sizes))


def estimate_delta(
    change: Floats,
    labels: NDArray[np.bool_],
    persons: NDArray[np.integer],
    weights: Floats | None = None,
    n_folds: int = 5,
    level_varies: bool = False,
) -> Estimate:
    """Return the balanced mean of `change` [repeats, rows] over the partitions: `estimate_mean` of a single cell."""
    return estimate_mean([Cell(change, labels, np.asarray(persons, dtype=np.int64), weights, n_folds, level_varies)])


def estimate_mean(cells: Sequence[Cell]) -> Estimate:
    """Return the mean over cells of the balanced mean of their change, with its standard error.

    The squared standard error has two parts. Both use the sums of psi by person in each partition. The first is the
    clustered variance of their mean over the partitions, which treats the probes as fixed. But each person is in the
    training data of the probes that score others, so scores of different people are correlated. For the same reason a
    row's score varies over the partitions: the second part is (K - 1) / 2 times that variance, summed over people
    (`partition_variance`). Cells whose level varies as a whole have a third part (`level_variance`).

    A person's rows are summed over all cells before they are squared, so the cells need not be independent. This is the
    limit of resampling people jointly for all cells (Efron's infinitesimal jackknife), without Monte Carlo error.
    Sums are corrected for few or unequal people by `_correction`, the degrees of freedom by `_freedom`.

    Raises ValueError for no cell, cells of different numbers of repeats or folds, or a class without rows.
    """
    if not cells or len({(len(cell.change), cell.n_folds) for cell in cells}) > 1:
        raise ValueError("a mean needs at least one cell, and the same number of repeats and folds in all cells")
    by_cell = np.stack([balanced_mean(cell.change, cell.labels, cell.weights) for cell in cells])  # [cells, repeats]
    sums, freedom = _corrected_sums(cells)
    n_folds, varying = cells[0].n_folds, [cell.level_varies for cell in cells]
    of_people = float(np.square(sums.mean(axis=0)).sum()) + partition_variance(sums, n_folds)
    of_level = level_variance(by_cell[varying].sum(axis=0) / len(cells), n_folds)
    variance = of_people + of_level
    if of_level > 0:
        freedom = sum_freedom([(of_people, freedom), (of_level, by_cell.shape[1] - 1)])
    return Estimate(float(by_cell.mean()), float(np.sqrt(variance)), freedom)


def _corrected_sums(cells: Sequence[Cell]) -> tuple[NDArray[np.float64], float]:
    """Return each person's corrected influence on the mean over cells [repeats, persons], and the degrees of freedom.

    Row i adds psi_i = 1/2 share_i (c_i - its class's mean of c) to a cell's balanced mean, where the shares of a class
    add up to 1. Cells of the same rows have the same shares and corrections, so their changes are summed first.
    """
    by_design: dict[tuple[bytes | None, ...], list[Cell]] = {}
    for cell in cells:
        weights = None if cell.weights is None else cell.weights.tobytes()
        by_design.setdefault((cell.labels.tobytes(), cell.persons.tobytes(), weights), []).append(cell)
    designs = list(by_design.values())
    _, person = np.unique(np.concatenate([same[0].persons for same in designs]), return_inverse=True)
    own = np.split(person, np.cumsum([len(same[0].persons) for same in designs])[:-1])
    n_persons = int(person.max()) + 1
    sums = np.zeros((len(cells[0].change), n_persons))
    share_of, spread_of = np.zeros(n_persons), np.zeros(n_persons)  # in the mean over cells
    for same, people in zip(designs, own, strict=True):
        cell, change = same[0], np.stack([cell.change for cell in same]).sum(axis=0, dtype=np.float64)
        ones = np.ones(len(people)) if cell.weights is None else cell.weights
        for rows in _class_shares(cell.labels, cell.weights):
            factor, share, spread = _correction(rows, ones * (rows > 0), people, n_persons)
            for repeat, of_rows in enumerate(change):
                psi = rows * (of_rows - of_rows @ rows)
                sums[repeat] += 0.5 * factor * np.bincount(people, psi, n_persons)
            share_of += 0.5 * len(same) * share
            spread_of += 0.5 * len(same) * spread
    return sums / len(cells), _freedom(share_of / len(cells), spread_of / len(cells))


def _correction(
    rows: Floats, weights: Floats, people: NDArray[np.intp], n_persons: int
) -> tuple[Floats, Floats, Floats]:
    """Return correction factor, share h and spread of each person in a class, each [persons], from its rows' shares.

    Working model: the means of people are independent, with variance v_e = rho + (1 - rho) / n_e, for rows that weigh
    n_e together (1 at least). A person with many rows pulls the class mean towards their own, so their expected squared
    distance from it is too small: (1 - 2 h_e) v_e + sum of h^2 v. A person's square, divided by that and multiplied by
    v_e, is unbiased. But where one person has most of the weight, that single square dominates the variance. So it is
    averaged with a pooled estimate, the mean of all people's squares scaled to the weights, which is unbiased too. With
    many people, their own squares dominate, whatever the working model.

    `factor` multiplies sums of psi; `spread` is the expected size of the result.
    """
    h, n = (np.bincount(people, of, n_persons).astype(np.float64) for of in (rows, weights))
    here = h > 0
    h_here = h[here]
    v = _CORRELATION + (1 - _CORRELATION) / np.maximum(n[here], 1)
    total = float(h_here**2 @ v)
    expected = v * (1 - 2 * h_here) + total  # of the squared distance from the mean of the class
    expected = np.where(expected > 1e-12 * v, expected, np.nan)  # the class has one person: the variance is unknown
    prior = _PRIOR_PEOPLE / (_PRIOR_PEOPLE + 1 / (h_here @ h_here))
    per_person = (1 - prior) * v + prior * total / (len(h_here) * h_here**2)
    factor, spread = np.zeros(n_persons), np.zeros(n_persons)
    factor[here] = np.sqrt(per_person / expected)
    spread[here] = h_here * np.sqrt(per_person)
    return factor, h, spread


def _freedom(share: Floats, spread: Floats) -> float:
    """Return the degrees of freedom of the variance summed over people, 1 at least.

    (sum of spread^2)^2 / sum of spread^4 is Satterthwaite's formula for independent sums. Kish's effective number of
    people is an upper limit, since large people dominate the mean. Subtract 2 for the two estimated class means.
    """
    squares = spread**2
    return float(max(1.0, min(squares.sum() ** 2 / (squares @ squares), 1 / (share @ share)) - 2))


def sum_freedom(parts: Sequence[tuple[float, float]]) -> float:
    """Return the degrees of freedom of a sum of independent variances, each with its own, 1 at least (Welch 1947)."""
    return float(max(1.0, sum(v for v, _ in parts) ** 2 / sum(v**2 / freedom for v, freedom in parts)))


def clustered_variance(psi: Floats, persons: NDArray[np.integer]) -> float:
    """Return E / (E - 1) times the sum over the E persons of (sum of their psi)^2; nan for a single person."""
    _, person = np.unique(persons, return_inverse=True)
    sums = np.bincount(person, weights=psi)
    n_persons = len(sums)
    return float(n_persons / (n_persons - 1) * (sums @ sums)) if n_persons > 1 else float("nan")


def partition_variance(sums: Floats, n_folds: int) -> float:
    """Return the squared error due to the choice of folds, from sums [repeats, persons]; 0 for one partition.

    The scores of persons i and j are correlated, because i is in training when j is scored and the reverse. To first
    order this adds (K - 1) l q to the variance of the mean. Here q is the variance of the persons' sums over the
    partitions, summed over persons, and l <= 2 / pi is the share of a score's sign that is linear in the training rows.
    Simulations gave l between 0.3 and 0.65; 1/2 is used.

    The usual alternative, the variance of the partition means, has only R - 1 degrees of freedom. For weak concepts and
    several mentions per person, its nominal 95 % intervals covered 0.915 to 0.93, these 0.945 to 0.965 (200 simulations
    each; `python -m scripts.validate --full` has more).
    """
    if len(sums) < 2:
        return 0.0
    return float((n_folds - 1) / 2 * sums.var(axis=0, ddof=1).sum())


def level_variance(levels: Floats, n_folds: int) -> float:
    """Return the squared error due to the level of a score, from its value in each partition [repeats]; 0 for one.

    Where a concept is weak, losses hardly depend on C, and chance chooses it. A share of variance (R²) depends on it
    much: a probe with a small C reads the directions of largest variance, of which more survives. All rows move
    together, which `partition_variance` does not see, since sums are taken around the mean. K - 1 is the factor of a
    jackknife that leaves out a K-th at a time: without a K-th of the people, probes vary by 1 / (K - 1) of what they do
    from sample to sample. On halves of the people of the Wikidata tasks, intervals of transfer_r2 without this part
    covered the other half in two cases of three (`python -m benchmarks.halves`).
    """
    return float((n_folds - 1) * np.var(levels, ddof=1)) if len(levels) > 1 else 0.0


def benjamini_hochberg(p_values: Sequence[float | None]) -> list[float | None]:
    """Return q values: the smallest false discovery rate at which each is a discovery (Benjamini & Hochberg 1995).

    None (not measured) stays None and is not counted as a test.
    """
    measured = [i for i, p in enumerate(p_values) if p is not None]
    p = np.array([p_values[i] for i in measured], dtype=np.float64)
    order = np.argsort(p)[::-1]  # from the largest
    ranks = np.arange(len(p), 0, -1)
    q = np.empty_like(p)
    q[order] = np.minimum.accumulate(np.minimum(p[order] * len(p) / ranks, 1.0))
    result: list[float | None] = [None] * len(p_values)
    for i, value in zip(measured, q, strict=True):
        result[i] = float(value)
    return result


def _class_shares(labels: NDArray[np.bool_], weights: Floats | None) -> list[NDArray[np.float64]]:
    """Return for each class the rows' shares [rows] of its weight, 0 outside the class."""
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=np.float64)
    shares = [np.where(labels == label, weights, 0.0) for label in (False, True)]
    if any(share.sum() <= 0 for share in shares):
        raise ValueError("a class has no rows, so its recall is undefined")
    return [share / share.sum() for share in shares]
