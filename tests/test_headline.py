"""Candidates for the headline score: compared with independent formulas, and their intervals with resampling."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import rel_entr
from scipy.stats import pearsonr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from benchmarks import headline
from benchmarks.paired_scores import PairCount
from benchmarks.sae_panel import pair_sets
from delta_selectivity.probing.probe_statistics import ProbeScores, quantised
from delta_selectivity.probing.uncertainty import balanced_mean, estimate_delta

FIRST, SECOND = "TopK, k 32", "BatchTopK, k 8"
N = 400


def made(n: int = N, seed: int = 0) -> ProbeScores:
    """Return scores of a good probe and of the same probe on a worse copy; 100 people, half the rows of each class."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 2 == 0
    own = np.where(labels, 1.0, -1.0) + random.normal(size=n) * 1.5
    copy = 0.7 * own + 0.3 + random.normal(size=n) * 0.6
    views = {name: quantised(np.stack([of, of])) for name, of in (("model", own), ("transfer", copy), ("sae", copy))}
    folds = np.stack([(np.arange(n) // 4 + 1) % 5, (np.arange(n) // 4 + 2) % 5]).astype(np.int8)
    return ProbeScores(views, labels, np.arange(n, dtype=np.int64) // 4, np.ones(n), folds)


def value(found: ProbeScores, name: str) -> float:
    return float(balanced_mean(headline.CANDIDATES[name](found, ""), found.labels, found.weights).mean())


def of_repeats(found: ProbeScores, formula) -> float:
    views = (found.views[name].astype(float) for name in ("model", "transfer"))
    return float(np.mean([formula(s, t) for s, t in zip(*views, strict=True)]))


def test_shares_equal_plain_formulas():
    found = made()
    y = found.labels
    assert value(found, "margin kept") == pytest.approx(
        of_repeats(found, lambda s, t: (t[y].mean() - t[~y].mean()) / (s[y].mean() - s[~y].mean()))
    )
    assert value(found, "rank kept") == pytest.approx(of_repeats(found, lambda s, t: pearsonr(s, t)[0] ** 2))
    assert value(found, "answers kept") == pytest.approx(of_repeats(found, lambda s, t: np.mean((s > 0) == (t > 0))))

    def divergence(s, t):
        p, q = (np.stack([1 / (1 + np.exp(-v)), 1 / (1 + np.exp(v))]) for v in (s, t))
        return -rel_entr(p, q).sum(axis=0).mean() / np.log(2)

    assert value(found, "belief kept") == pytest.approx(of_repeats(found, divergence))


def test_bits_are_those_of_scikit_learn_fitted_to_the_other_folds():
    found = made()

    def calibrated(values, folds):
        p = np.empty(N)
        for fold in range(5):
            here = folds == fold
            model = LogisticRegression(C=1e9, tol=1e-10, class_weight="balanced", max_iter=1000)
            p[here] = model.fit(values[~here, None], found.labels[~here]).predict_proba(values[here, None])[:, 1]
        return 1 - log_loss(found.labels, p) / np.log(2)

    own, copy = (
        np.mean([calibrated(v.astype(float), f) for v, f in zip(found.views[name], found.folds, strict=True)])
        for name in ("model", "transfer")
    )
    assert copy < own
    assert value(found, "bits kept") == pytest.approx(copy - own, abs=1e-6)


@pytest.mark.parametrize("name", ["margin kept", "rank kept", "transfer_r2"])
def test_the_interval_of_a_ratio_equals_resampling_of_people(name):
    found = made()
    parts = headline.CANDIDATES[name](found, "")
    told = estimate_delta(parts, found.labels, found.persons, found.weights, 5).standard_error
    drawn = [value(made(seed=seed), name) for seed in range(1, 121)]
    assert told == pytest.approx(np.std(drawn), rel=0.35)


def test_the_rule_chooses_only_clearly_better_candidates():
    def counts(first: int, second: int, wrong: int = 0) -> headline.Counts:
        base = {name: PairCount(100, 60, 50, 1, 0) for name in headline.CANDIDATES}
        of = {FIRST: (first, 0), SECOND: (second, wrong)}
        return {
            half: {"snapshots": {**base, "belief kept": PairCount(100, 60, right, bad, 0)}}
            for half, (right, bad) in of.items()
        }

    assert "Chosen on TopK, k 32: belief kept" in headline.verdict(counts(51, 40))
    assert headline.verdict(counts(51, 55)).endswith("it is added.")
    assert headline.verdict(counts(51, 54)).endswith("transfer_r2 stays the headline.")
    assert headline.verdict(counts(51, 60, wrong=2)).endswith("transfer_r2 stays the headline.")


def test_the_halves_share_no_sae():
    halves = {
        half: {sae for each in pair_sets() if each.family == half for pair in each.names for sae in pair}
        for half in (FIRST, SECOND)
    }
    assert not halves[FIRST] & halves[SECOND]
    assert sum(map(len, halves.values())) == len({sae for half in halves.values() for sae in half}) == 42
