"""Clustered errors compared with hand computation, coverage by simulation, q values compared with SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import false_discovery_control, t, ttest_ind

from delta_selectivity.probing.uncertainty import (
    Cell,
    Estimate,
    balanced_mean,
    benjamini_hochberg,
    clustered_variance,
    effective_people,
    estimate_delta,
    estimate_mean,
)
from validation.world import one_large, zipf


def test_a_small_example_computed_by_hand():
    labels = np.array([True, True, True, False, False, False])
    change = np.array([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])  # one positive row gained: +1/3 of its class, +1/6 in total
    estimate = estimate_delta(change, labels, np.arange(6))
    assert estimate.value == pytest.approx(1 / 6)
    of_class_mean = 1 / 3 / 3  # the sample variance of 1, 0, 0 divided by the number of people
    assert estimate.standard_error == pytest.approx((of_class_mean / 4) ** 0.5)
    assert estimate.high - estimate.value == pytest.approx(t(4).ppf(0.975) * estimate.standard_error)
    together = estimate_delta(change, labels, np.array([0, 1, 1, 2, 3, 4]))
    assert together.degrees_of_freedom < 3


def test_equal_people_give_welchs_error():
    """Compare with SciPy's unequal-variance test on the people's means, with equal numbers of people and rows."""
    rng = np.random.default_rng(0)
    persons = np.repeat(np.arange(24), 4)
    labels, change = persons % 2 == 0, rng.normal(size=96) + rng.normal(size=24)[persons]
    estimate = estimate_delta(change[None], labels, persons)
    means = change.reshape(24, 4).mean(axis=1)
    # our mean of the classes' means is half the difference of one class and the negative of the other
    result = ttest_ind(means[::2], -means[1::2], equal_var=True)
    assert estimate.value / estimate.standard_error == pytest.approx(result.statistic)
    assert estimate.p_value == pytest.approx(result.pvalue)


def test_agrees_with_a_plain_loop():
    rng = np.random.default_rng(0)
    labels, groups, weights = (
        rng.random(400) < 0.3,
        rng.integers(0, 60, 400) // rng.integers(1, 6, 400),
        rng.random(400),
    )
    change = rng.integers(-1, 2, (5, 400)).astype(np.float64)
    people = sorted(set(groups.tolist()))
    sums = np.zeros((5, len(people)))
    spread, share = np.zeros(len(people)), np.zeros(len(people))
    for side in (False, True):
        own = labels == side
        h = np.array([weights[own & (groups == e)].sum() for e in people]) / weights[own].sum()
        there = [i for i in range(len(people)) if h[i] > 0]
        v = np.zeros(len(people))
        for i in there:
            v[i] = 0.5 + 0.5 / max(1, weights[own & (groups == people[i])].sum())
        total = sum(h[i] ** 2 * v[i] for i in there)
        kish = 1 / sum(h**2)
        for i in there:
            mine = own & (groups == people[i])
            by_all = total / (len(there) * h[i] ** 2)
            wanted = kish / (kish + 20) * v[i] + 20 / (kish + 20) * by_all
            factor = np.sqrt(wanted / ((1 - 2 * h[i]) * v[i] + total))
            for r, c in enumerate(change):
                mean = np.average(c[own], weights=weights[own])
                sums[r, i] += factor * weights[mine] @ (c[mine] - mean) / weights[own].sum() / 2
            spread[i] += h[i] * np.sqrt(wanted) / 2
            share[i] += h[i] / 2
    expected = np.sum(sums.mean(axis=0) ** 2) + 4 / 2 * np.var(sums, axis=0, ddof=1).sum()
    freedom = min(np.sum(spread**2) ** 2 / np.sum(spread**4), 1 / np.sum(share**2)) - 2

    estimate = estimate_delta(change, labels, groups, weights)
    assert estimate.standard_error == pytest.approx(expected**0.5)
    assert estimate.degrees_of_freedom == pytest.approx(freedom)
    several = estimate_mean([Cell(change, labels, groups, weights)] * 3)
    assert (several.standard_error, several.degrees_of_freedom) == pytest.approx((expected**0.5, freedom))


def test_many_equal_people_give_the_liang_zeger_error():
    """Sums of people's psi, squared, without a correction, which large samples do not need."""
    rng = np.random.default_rng(5)
    persons = np.repeat(np.arange(2000), 3)
    labels, change = persons % 2 == 0, rng.integers(-1, 2, 6000).astype(np.float64)
    psi = np.where(labels, change - change[labels].mean(), change - change[~labels].mean()) / 6000
    assert estimate_delta(change[None], labels, persons).standard_error == pytest.approx(
        clustered_variance(psi, persons) ** 0.5, rel=1e-3
    )


def test_both_parts_of_the_correction_are_unbiased_where_a_person_is_large():
    """The expected square of the standard error is the variance of the mean under the working model."""
    rng = np.random.default_rng(6)
    sizes = np.array([40, *[5] * 12, 30, *[2] * 9])
    persons = np.repeat(np.arange(len(sizes)), sizes)
    labels = persons < 13
    found = []
    for _ in range(3000):
        change = rng.normal(size=len(persons)) + rng.normal(size=len(sizes))[persons]  # correlation 1/2
        estimate = estimate_delta(change[None], labels, persons)
        found.append((estimate.value, estimate.standard_error**2))
    values, squares = np.array(found).T
    assert squares.mean() == pytest.approx(values.var(), rel=0.1)


def test_effective_people_follow_kish():
    assert effective_people(np.repeat(np.arange(11), [290, *[1] * 10])) == pytest.approx(300**2 / (290**2 + 10))
    assert effective_people(np.arange(8) // 2) == 4
    assert effective_people(np.array([0, 0, 1]), np.array([0.5, 0.5, 1.0])) == 2


def test_equal_weights_do_not_matter():
    rng = np.random.default_rng(1)
    labels, values = rng.random(50) < 0.5, rng.random((2, 50))
    np.testing.assert_allclose(balanced_mean(values, labels), balanced_mean(values, labels, np.full(50, 0.2)))


def test_zero_change_has_zero_error():
    estimate = estimate_delta(np.zeros((5, 40)), np.arange(40) < 20, np.arange(40))
    assert (estimate.value, estimate.standard_error, estimate.low, estimate.high) == (0, 0, 0, 0)
    assert estimate.p_value == 1.0


def test_a_single_class_is_rejected():
    with pytest.raises(ValueError, match="class"):
        balanced_mean(np.ones(3), np.ones(3, dtype=bool))


def _simulate(rng, people, mentions, truth):
    """Return correctness of two views [rows] with effects of person and row; the SAE's recall is lower by `truth`."""
    groups = np.repeat(np.arange(people), rng.poisson(mentions - 1, people) + 1)
    labels = (np.arange(people) % 2 == 0)[groups]
    luck = rng.normal(size=people)[groups] + rng.normal(size=len(groups))
    drift = rng.normal(size=people)[groups] + rng.normal(size=len(groups))
    model = luck > -1
    flipped = rng.random(len(groups)) < np.where(drift > 0.5, 0.2, 0.02)
    sae = np.where(flipped, ~model, model)
    lost = model & (rng.random(len(groups)) < truth)
    return (sae & ~lost).astype(float) - model, labels, groups


def _truth(truth):
    change, labels, _ = _simulate(np.random.default_rng(99), 400_000, 1, truth)
    return float(balanced_mean(change, labels))


@pytest.mark.parametrize(("people", "mentions"), [(20, 5), (300, 5), (300, 1)])
def test_intervals_cover_the_truth(people, mentions):
    rng, truth = np.random.default_rng(2), _truth(0.05)
    covered = []
    for _ in range(600):
        change, labels, groups = _simulate(rng, people, mentions, 0.05)
        estimate = estimate_delta(change[None], labels, groups)
        covered.append(estimate.low <= truth <= estimate.high)
    assert 0.92 <= np.mean(covered) <= 0.985


def test_rows_of_one_person_are_not_independent():
    """The change depends on one person: treating rows as persons would find significance."""
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(100), 8)
    labels = groups % 2 == 0
    found = {"person": 0, "row": 0}
    for _ in range(400):
        by_person = rng.choice([-1.0, 0.0, 1.0], 100, p=[0.1, 0.8, 0.1])[groups] * (rng.random(800) < 0.7)
        for name, clusters in (("person", groups), ("row", np.arange(800))):
            found[name] += estimate_delta(by_person[None], labels, clusters).p_value < 0.05
    assert found["person"] / 400 < 0.08
    assert found["row"] / 400 > 0.2


def test_benjamini_hochberg_equals_scipy():
    p = np.random.default_rng(4).random(30) ** 3
    p[3] = p[7]
    np.testing.assert_allclose(benjamini_hochberg(list(p)), false_discovery_control(p))


def test_missing_p_values_are_not_tests():
    q = benjamini_hochberg([0.01, None, 0.04])
    assert q[1] is None
    assert [q[0], q[2]] == pytest.approx([0.02, 0.04])
    assert benjamini_hochberg([None]) == [None]
    assert benjamini_hochberg([]) == []


def test_the_error_of_a_mean_over_cells_equals_joint_resampling_of_people():
    """Compare with 4000 bootstrap draws of people; cells have different rows, classes and people."""
    rng = np.random.default_rng(7)
    luck = rng.normal(size=400)
    cells = []
    for _ in range(6):
        persons = rng.integers(0, 400, 700)
        change = (rng.random(700) < 1 / (1 + np.exp(-luck[persons]))).astype(float) - rng.integers(0, 2, 700)
        cells.append(Cell(change[None], rng.random(700) < 0.3, persons))
    means = []
    for _ in range(4000):
        drawn = np.bincount(rng.integers(0, 400, 400), minlength=400)
        means.append(np.mean([balanced_mean(c.change, c.labels, drawn[c.persons] + 1e-12) for c in cells]))
    estimate = estimate_mean(cells)
    assert estimate.standard_error == pytest.approx(np.std(means), rel=0.06)
    alone = [estimate_mean([cell]).standard_error for cell in cells]
    assert estimate.standard_error > 1.15 * np.mean(alone) / 6**0.5, "the cells are not independent"


def test_inconsistent_cells_are_rejected():
    cell = Cell(np.zeros((2, 4)), np.array([True, True, False, False]), np.arange(4))
    other = Cell(np.zeros((3, 4)), cell.labels, cell.persons)
    for cells in ([], [cell, other]):
        with pytest.raises(ValueError, match="repeats"):
            estimate_mean(cells)


def test_equivalence_is_two_one_sided_tests():
    estimate = Estimate(value=0.005, standard_error=0.006, degrees_of_freedom=10_000)
    assert estimate.within(0.02)
    assert not estimate.within(0.0145)
    assert estimate.detectable == pytest.approx((1.96 + 0.8416) * 0.006, rel=1e-3)


@pytest.mark.parametrize(
    "sizes",
    [(8,) * 12, zipf(12, 100), zipf(50, 300), one_large(12, 100, 0.3), one_large(50, 200, 0.3)],
    ids=["12 equal", "12 Zipf", "50 Zipf", "12, one large", "50, one large"],
)
def test_few_and_unequal_people_are_covered_and_not_called_different(sizes):
    """The quick version of `python -m scripts.validate --people`, on scores without fitting a probe."""
    rng, persons = np.random.default_rng(8), np.repeat(np.arange(len(sizes)), sizes)
    covered, found = [], []
    for _ in range(500):
        labels = (rng.permutation(len(sizes)) % 2 == 0)[persons]
        drift = 0.6 * rng.normal(size=len(sizes))[persons] + 0.8 * rng.normal(size=len(persons))
        change = (drift > 1).astype(float) - (drift < -1)  # symmetric: there is no true difference
        estimate = estimate_delta(change[None], labels, persons)
        covered.append(estimate.low <= 0 <= estimate.high)
        found.append(estimate.p_value < 0.05)
    assert 0.93 <= np.mean(covered) <= 0.995, "beside one large person intervals are rather too wide than too narrow"
    assert np.mean(found) <= 0.069
