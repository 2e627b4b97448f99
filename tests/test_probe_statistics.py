"""Every figure of one probe, compared with scikit-learn, NumPy or simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import balanced_accuracy_score, log_loss, r2_score, roc_auc_score
from sklearn.utils.class_weight import compute_sample_weight

from delta_selectivity.probing.folds import FoldPlan
from delta_selectivity.probing.probe_statistics import (
    ProbeScores,
    auc_parts,
    bits,
    correct,
    quantised,
    r2_parts,
    statistics,
)
from delta_selectivity.probing.probes import choose_backend
from delta_selectivity.probing.selectivity import fit_model, out_of_fold
from delta_selectivity.probing.uncertainty import balanced_mean, estimate_delta


def found_scores(rows=400, repeats=3, damage=1.0, seed=0, people=150, weighted=False) -> ProbeScores:
    """Return a model's scores, an SAE's worse scores, and labels; rows of a person are correlated."""
    rng = np.random.default_rng(seed)
    persons = rng.integers(0, people, rows)
    labels = rng.random(rows) < 0.4
    luck = rng.normal(size=people)[persons] + rng.normal(size=(repeats, rows)) * 0.3 + rng.normal(size=rows)
    model = 2.0 * labels - 1 + luck
    views = {"model": model, "sae": model + damage * rng.normal(size=(repeats, rows)), "transfer": model - 1.5}
    weights = rng.uniform(0.2, 1, rows) if weighted else np.ones(rows)
    folds = rng.integers(0, 5, (repeats, rows)).astype(np.int8)
    kept = {name: quantised(scores.astype(np.float32)) for name, scores in views.items()}
    return ProbeScores(kept, labels, persons, weights, folds)


@pytest.mark.parametrize("weighted", [False, True])
def test_selectivity_auc_and_bits_are_scikit_learns(weighted):
    found = found_scores(weighted=weighted)
    result = statistics(found)
    labels, weights = found.labels, found.weights
    balanced = weights * compute_sample_weight("balanced", labels)
    balanced = np.where(labels, weights / weights[labels].sum(), weights / weights[~labels].sum())
    for view in ("model", "sae", "transfer"):
        scores = found.views[view].astype(np.float64)
        accuracy = [balanced_accuracy_score(labels, s > 0, sample_weight=weights) for s in scores]
        auc = [roc_auc_score(labels, s, sample_weight=weights) for s in scores]
        loss = [log_loss(labels, 1 / (1 + np.exp(-s)), sample_weight=balanced) for s in scores]
        assert getattr(result, f"{view}_sel") == pytest.approx(np.mean(accuracy))
        assert getattr(result, f"{view}_auc") == pytest.approx(np.mean(auc), abs=1e-6)
        assert getattr(result, f"{view}_bits") == pytest.approx(1 - np.mean(loss) / np.log(2))
    assert result.delta_sel == pytest.approx(result.sae_sel - result.model_sel)
    assert result.delta_auc == pytest.approx(result.sae_auc - result.model_auc)
    assert result.transfer_delta == pytest.approx(result.transfer_sel - result.model_sel)
    assert result.transfer_sel < result.model_sel


def test_ties_count_half_in_the_auc():
    labels = np.array([True, True, False, False])
    scores = np.array([[1.0, 0.0, 0.0, -1.0]], dtype=np.float16)
    found = ProbeScores(
        {"model": scores, "sae": scores * 0}, labels, np.arange(4), np.ones(4), np.zeros((1, 4), np.int8)
    )
    result = statistics(found)
    assert result.model_auc == 3.5 / 4
    assert result.sae_auc == 0.5


def test_transfer_r2_is_scikit_learns_of_the_models_scores_with_the_classes_balanced():
    found = found_scores(weighted=True)
    weight = np.where(
        found.labels, *(found.weights / found.weights[found.labels == side].sum() for side in (True, False))
    )
    views = {name: scores.astype(np.float64) for name, scores in found.views.items()}
    expected = [r2_score(m, t, sample_weight=weight) for m, t in zip(views["model"], views["transfer"], strict=True)]
    result = statistics(found)
    assert result.transfer_r2 == pytest.approx(np.mean(expected))
    assert result.transfer_r2_ci_low < result.transfer_r2 < result.transfer_r2_ci_high
    same = statistics(replace(found, views={**found.views, "transfer": found.views["model"]}))
    assert (same.transfer_r2, same.transfer_r2_ci_low, same.transfer_r2_ci_high) == (1, 1, 1)
    silent = {**found.views, "model": np.zeros_like(found.views["model"])}
    assert np.isfinite(statistics(replace(found, views={**silent, "transfer": silent["model"]})).transfer_r2)


def test_transfer_r2_leaves_outliers_out_as_if_they_were_not_there():
    """A single sink would ruin a ratio of variances; without it, the value is scikit-learn's on the other rows."""
    found = found_scores(weighted=True)
    outlier = np.isin(np.arange(len(found.labels)), [7, 100, 101])
    views = {name: scores.copy() for name, scores in found.views.items()}
    views["transfer"][:, outlier] = 3000
    found, kept = replace(found, views=views), ~outlier
    weight = np.zeros(len(kept))
    for side in (True, False):
        rows = kept & (found.labels == side)
        weight[rows] = found.weights[rows] / found.weights[rows].sum()
    pairs = zip(views["model"].astype(float), views["transfer"].astype(float), strict=True)
    expected = np.mean([r2_score(m[kept], t[kept], sample_weight=weight[kept]) for m, t in pairs])
    result, ruined = statistics(replace(found, outliers=outlier)), statistics(found)
    assert result.transfer_r2 == pytest.approx(expected)
    assert ruined.transfer_r2 < -10
    assert (result.n_outliers, ruined.n_outliers) == (3, 0)
    gone = statistics(
        ProbeScores(
            {name: scores[:, kept] for name, scores in views.items()},
            found.labels[kept], found.persons[kept], found.weights[kept], found.folds[:, kept],
        )
    )  # fmt: skip
    assert result.transfer_r2_ci_low == pytest.approx(gone.transfer_r2_ci_low, abs=2e-3)
    assert result.transfer_r2_ci_high == pytest.approx(gone.transfer_r2_ci_high, abs=2e-3)
    assert (result.delta_sel, result.delta_bits) == (ruined.delta_sel, ruined.delta_bits)


def test_transfer_r2_counts_all_rows_where_a_class_has_outliers_only():
    found = found_scores()
    result = statistics(replace(found, outliers=found.labels))
    assert result.transfer_r2 == statistics(found).transfer_r2
    assert result.n_outliers == found.labels.sum()


def test_the_interval_of_transfer_r2_has_the_right_coverage():
    """The model's scores have variance 1, and x̂ adds noise of variance 0.3: R² is 0.7."""
    rng, covered = np.random.default_rng(3), []
    for _ in range(400):
        labels = np.arange(200) % 2 == 0
        model = rng.normal(size=(1, 200))
        views = {"model": model, "sae": model, "transfer": model + 0.3**0.5 * rng.normal(size=(1, 200))}
        kept = {name: quantised(values.astype(np.float32)) for name, values in views.items()}
        found = ProbeScores(kept, labels, np.arange(200), np.ones(200), np.zeros((1, 200), np.int8))
        result = statistics(found)
        covered.append(result.transfer_r2_ci_low <= 0.7 <= result.transfer_r2_ci_high)
    assert 0.92 < np.mean(covered) < 0.98


def test_the_error_of_the_auc_equals_delong():
    """Compare with the structural components of DeLong et al. 1988, with one row per person and one partition."""
    found = found_scores(rows=300, repeats=1)
    found = replace(found, persons=np.arange(300))
    x, y = (found.views["model"][0, found.labels == side].astype(float) for side in (True, False))
    wins = (x[:, None] > y) + 0.5 * (x[:, None] == y)
    variance = wins.mean(1).var(ddof=1) / len(x) + wins.mean(0).var(ddof=1) / len(y)
    ours = estimate_delta(auc_parts(found, "model"), found.labels, found.persons)
    assert ours.value == pytest.approx(wins.mean())
    assert ours.standard_error == pytest.approx(variance**0.5, rel=0.01)


def test_a_score_of_zero_has_no_bits():
    found = found_scores(rows=20, people=20)
    silent = replace(found, views={**found.views, "sae": np.zeros((3, 20), dtype=np.float16)})
    np.testing.assert_allclose(bits(silent, "sae"), 0, atol=1e-12)
    assert correct(silent, "sae").sum() == 3 * (~found.labels).sum()


def test_the_interval_of_the_retained_share_has_the_right_coverage():
    """The model is right in 90 % of the rows, the SAE in 80 %: above chance 0.4 and 0.3, so 3/4 is retained."""
    rng, covered = np.random.default_rng(5), []
    for _ in range(300):
        labels = np.arange(400) % 2 == 0
        hits = {view: rng.random((1, 400)) < rate for view, rate in (("model", 0.9), ("sae", 0.8))}
        views = {name: np.where(hit == labels, 1, -1).astype(np.float16) for name, hit in hits.items()}
        found = ProbeScores(views, labels, np.arange(400), np.ones(400), np.zeros((1, 400), np.int8))
        result = statistics(found)
        covered.append(result.retained_ci_low <= 0.75 <= result.retained_ci_high)
    assert 0.92 < np.mean(covered) < 0.98


def test_a_model_at_chance_has_no_retained_share():
    found = found_scores()
    coin = quantised(np.random.default_rng(0).normal(size=(3, 400)).astype(np.float32))
    assert statistics(replace(found, views={**found.views, "model": coin})).retained is None
    assert statistics(found).retained is not None


def test_preserved_requires_an_equivalence_test():
    small, large = found_scores(rows=60, people=60), found_scores(rows=6000, people=6000, damage=0.02)
    assert not statistics(small, epsilon=0.02).preserved
    assert statistics(large, epsilon=0.02).preserved
    assert not statistics(large, epsilon=1e-5).preserved


def test_detectable_differences_are_found_with_80_percent_power():
    rng = np.random.default_rng(1)
    labels = np.arange(2000) % 2 == 0

    def drawn(truth):
        """Return rows that change in both directions, with this mean."""
        changes = rng.choice([-1.0, 0.0, 1.0], (1, 2000), p=[0.1 - truth / 2, 0.8, 0.1 + truth / 2])
        return estimate_delta(changes, labels, np.arange(2000))

    detectable = drawn(0.0).detectable
    assert detectable == pytest.approx((norm.ppf(0.975) + norm.ppf(0.8)) * (0.2 / 2000) ** 0.5, rel=0.1)
    assert 0.73 < np.mean([drawn(-detectable).p_value < 0.05 for _ in range(400)]) < 0.87


def test_scores_keep_their_signs_and_their_order_in_float16():
    scores = np.array([0.0, 1e-12, -1e-12, 1e-3, -1e-3, 7e4, -1e9, np.float32(3e38)], dtype=np.float32)
    kept = quantised(scores)
    assert kept.dtype == np.float16
    assert np.isfinite(kept).all()
    np.testing.assert_array_equal(np.sign(kept), np.sign(scores))
    order = np.sort(scores)
    assert (np.diff(quantised(order).astype(np.float64)) >= 0).all()


def test_a_view_that_was_not_measured_has_no_figures():
    found = found_scores()
    views = {name: scores for name, scores in found.views.items() if name != "transfer"}
    without = statistics(replace(found, views={**views, "latents": found.views["sae"]}))
    assert without.transfer_sel is without.transfer_delta is without.transfer_p_value is without.transfer_auc is None
    assert without.error_sel is without.error_auc is None
    assert without.latent_sel == without.sae_sel
    assert without.memorisation is None


def test_memorisation_is_the_balanced_accuracy_of_the_control_task_above_chance():
    rng = np.random.default_rng(0)
    labels = rng.random(400) < 0.5
    scores = quantised(np.where(rng.random(400) < 0.8, 1, -1).astype(np.float32) * (2 * labels - 1))
    found = replace(found_scores(), control_scores=scores, control_labels=labels)
    assert statistics(found).memorisation == pytest.approx(balanced_mean((scores > 0) == labels, labels) - 0.5)
    assert 0.2 < statistics(found).memorisation < 0.4


def test_the_error_of_transfer_r2_includes_the_choice_of_c():
    """A weak concept: C varies from sample to sample, and with it how much of the probe's reading survives."""
    fixed, backend = np.random.default_rng(0), choose_backend("torch", "cpu")[0]
    strong, direction = 3 * fixed.normal(size=(6, 40)) / 6**0.5, fixed.normal(size=40) / 40**0.5
    found = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        labels = np.arange(300) % 2 == 0
        sign = np.where(labels, 1, -1)[:, None]
        common, own = (rng.normal(size=(300, 6)) @ strong + 0.2 * sign * strong[0], rng.normal(size=(300, 40)))
        x, copy = map(torch.from_numpy, (common + own + 0.6 * sign * direction, common + 0.3 * own))
        plan = FoldPlan.build(labels[None], np.arange(300), None, 5, 5, seed)
        probe = out_of_fold(plan, fit_model(plan, x.float(), backend), copy.float(), backend).probe(0)
        of_people = estimate_delta(r2_parts(probe, "transfer"), probe.labels, probe.persons)
        told = statistics(probe)
        found.append(
            (told.transfer_r2, (told.transfer_r2_ci_high - told.transfer_r2_ci_low) / 4, of_people.standard_error)
        )
    values, with_level, without = np.array(found).T
    sd = values.std(ddof=1)
    assert np.sqrt(np.mean(np.square(without))) < 0.5 * sd
    assert 0.75 * sd < np.sqrt(np.mean(np.square(with_level))) < 2 * sd


def test_the_variance_of_a_level_is_that_of_the_partitions():
    labels = np.arange(200) % 2 == 0
    levels = np.array([0.1, 0.4, 0.3, 0.6, 0.2])
    change = np.repeat(levels[:, None], 200, axis=1)  # no row differs from another
    assert estimate_delta(change, labels, np.arange(200)).standard_error == pytest.approx(0, abs=1e-9)
    found = estimate_delta(change, labels, np.arange(200), level_varies=True)
    assert found.value == pytest.approx(levels.mean())
    assert found.standard_error == pytest.approx((4 * levels.var(ddof=1)) ** 0.5)
    assert found.degrees_of_freedom == pytest.approx(4)
    assert estimate_delta(change[:1], labels, np.arange(200), level_varies=True).standard_error == pytest.approx(0)
