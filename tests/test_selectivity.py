"""Out-of-fold scores compared with a plain loop over scikit-learn, then properties of any selectivity."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from delta_selectivity.probing.backends.torch_lbfgs import TorchLbfgs
from delta_selectivity.probing.folds import FoldPlan, Skipped, control_plan, grouped_stratified_folds
from delta_selectivity.probing.selectivity import (
    DEFAULT_CS,
    ProbeResult,
    as_record,
    fit_model,
    fit_sparse,
    fit_view,
    measure,
    out_of_fold,
    training_scales,
)
from delta_selectivity.probing.uncertainty import effective_people

BACKEND = TorchLbfgs()


def world(rows=300, d=10, people=120, targets=1, seed=0):
    """Return x [rows, d], a few directions of which determine the labels of a person; noise is by row."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, people, rows)
    traits = rng.normal(size=(people, targets))
    labels = (traits[groups] > np.linspace(-0.5, 0.5, targets)).T
    mixing = rng.normal(size=(d, d)) * np.arange(1, d + 1) ** -0.7
    hidden = rng.normal(size=(rows, d))
    hidden[:, :targets] += traits[groups]
    x = torch.from_numpy((hidden @ mixing * 5 + rng.normal(size=d) * 10).astype(np.float32))
    return x, labels, groups


def damaged(x, share=0.7, seed=1):
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return x + share * x.std(dim=0) * noise


def plan_of(labels, groups, n_repeats=2, seed=0, weights=None) -> FoldPlan:
    return FoldPlan.build(labels, groups, weights, n_folds=5, n_repeats=n_repeats, seed=seed)


def records_of(plan, x, view, **options):
    """Return the JSON records of one view and the model."""
    return [
        as_record(result)
        for result in measure(out_of_fold(plan, fit_model(plan, x, BACKEND), view, BACKEND, **options))
    ]


def by_scikit_learn(plan, x, scale_from, repeat):
    """Compute directly: scores [rows] of one partition, the C of each fold, and all probes with their scalers."""
    label, fold = plan.labels[0], plan.folds[repeat]
    scores = {c: np.empty(len(label)) for c in DEFAULT_CS}
    probes = {}
    for k in range(5):
        train = fold != k
        scaler = StandardScaler()
        scaled = x.double().numpy()
        if scale_from is not None:
            scaled = scaler.fit(scale_from[train].double().numpy()).transform(scaled)
        for c in DEFAULT_CS:
            probe = LogisticRegression(C=c, class_weight="balanced", tol=1e-10, solver="newton-cholesky")
            probes[k, c] = probe.fit(scaled[train], label[train]), scaler
            scores[c][~train] = probe.decision_function(scaled[~train])
    chosen, result = [], np.empty(len(label))
    for k in range(5):
        others = fold != k
        weight = compute_sample_weight("balanced", label[others])
        p = {c: 1 / (1 + np.exp(-scores[c][others])) for c in DEFAULT_CS}
        chosen.append(min(DEFAULT_CS, key=lambda c: log_loss(label[others], p[c], sample_weight=weight)))
        result[~others] = scores[chosen[-1]][~others]
    return result, chosen, probes


def test_selectivity_agrees_with_a_plain_loop_over_scikit_learn():
    x, labels, groups = world()
    recon, plan = damaged(x), plan_of(labels, groups)
    found = out_of_fold(plan, fit_model(plan, x, BACKEND), recon, BACKEND, error_view=True)
    accuracies = {"model": [], "sae": [], "error": [], "transfer": []}
    for repeat in range(2):
        for name, view in {"model": x, "sae": recon, "error": x - recon}.items():
            scores, chosen, probes = by_scikit_learn(plan, view, x, repeat)
            assert list(found.fits[name].chosen_c[0, repeat]) == chosen
            kept = found.probe(0).views[name][repeat]  # float16 rounding: half of 2**-10
            np.testing.assert_allclose(kept, scores, rtol=6e-4, atol=1e-4 * scores.std())
            accuracies[name].append(balanced_accuracy_score(labels[0], scores > 0))
            if name == "model":
                accuracies["transfer"].append(_transfer(plan, recon, repeat, chosen, probes))
    result = measure(found)[0]
    assert isinstance(result, ProbeResult)
    for name, values in accuracies.items():
        assert getattr(result, f"{name}_sel") == pytest.approx(np.mean(values), abs=1e-12)
    assert result.delta_sel == pytest.approx(result.sae_sel - result.model_sel)
    assert result.transfer_delta == pytest.approx(result.transfer_sel - result.model_sel)
    assert result.ci_low < result.delta_sel < result.ci_high
    assert result.converged
    assert (result.n_rows, result.n_people, result.n_pos) == (300, len(set(groups)), labels.sum())


def _transfer(plan, recon, repeat, chosen, probes):
    scores = np.empty(len(recon))
    for k, c in enumerate(chosen):
        probe, scaler = probes[k, c]
        held_out = plan.folds[repeat] == k
        scores[held_out] = probe.decision_function(scaler.transform(recon[held_out].double().numpy()))
    return balanced_accuracy_score(plan.labels[0], scores > 0)


def test_targets_do_not_depend_on_each_other():
    x, labels, groups = world(targets=3)
    together = plan_of(labels, groups)
    fit = fit_view(together, x, training_scales(together, x), BACKEND)
    for t in range(3):
        alone = FoldPlan(labels[[t]], (0,), {}, together.groups, together.weights, together.folds, 5)
        single = fit_view(alone, x, training_scales(alone, x), BACKEND)
        np.testing.assert_array_equal(single.chosen_c[0], fit.chosen_c[t])
        torch.testing.assert_close(single.scores[0], fit.scores[t], rtol=1e-3, atol=1e-4)


def test_latents_are_probed_unscaled_and_agree_with_a_plain_loop():
    """Compared with unscaled dense codes, two columns of which are silent; there is no transfer."""
    x, labels, groups = world()
    random = torch.Generator().manual_seed(0)
    dictionary = torch.randn(10, 24, generator=random)
    codes = torch.relu((x - x.mean(dim=0)) @ dictionary / 50 - 0.5)
    codes[:, [3, 17]] = 0
    plan = plan_of(labels, groups)
    found = out_of_fold(plan, fit_model(plan, x, BACKEND), damaged(x), BACKEND, latents=codes.to_sparse_csr())
    assert found.views == ("model", "sae", "transfer", "latents")
    result = measure(found)[0]
    accuracies = []
    for repeat in range(2):
        scores, chosen, _ = by_scikit_learn(plan, codes, None, repeat)  # None: unscaled
        assert list(found.fits["latents"].chosen_c[0, repeat]) == chosen
        kept = found.probe(0).views["latents"][repeat]
        np.testing.assert_allclose(kept, scores, rtol=6e-4, atol=1e-3 * scores.std())
        accuracies.append(balanced_accuracy_score(labels[0], scores > 0))
    assert result.latent_sel == pytest.approx(np.mean(accuracies), abs=1e-3)
    assert "latent_sel" in as_record(result)
    assert "error_sel" not in as_record(result)


def test_another_view_of_the_rows_has_no_transfer():
    x, labels, groups = world()
    plan = plan_of(labels, groups)
    bag = torch.nn.functional.one_hot(torch.from_numpy(groups % 7), 7).float().to_sparse_csr()
    found = out_of_fold(plan, fit_model(plan, x, BACKEND), fit_sparse(plan, bag, BACKEND), BACKEND, error_view=True)
    assert found.views == ("model", "sae")
    record = as_record(measure(found)[0])
    assert record["transfer_sel"] is record["transfer_delta"] is record["transfer_r2"] is None
    assert record["delta_sel"] < 0


def test_the_control_task_is_memorised_if_possible():
    x, labels, groups = world(rows=400, d=10)
    types = np.arange(400) % 40
    told = torch.nn.functional.one_hot(torch.from_numpy(types), 40).float() * 10  # x contains the token
    plan = plan_of(labels, groups)
    control = control_plan(types, np.arange(400), None, n_folds=5, seed=0)
    by_view = {}
    for name, view in {"blind": x, "sighted": torch.cat([x, told], dim=1)}.items():
        model = fit_model(plan, view, BACKEND, control=control)
        by_view[name] = measure(out_of_fold(plan, model, view, BACKEND))[0].memorisation
    assert abs(by_view["blind"]) < 0.08
    assert by_view["sighted"] > 0.45
    assert control_plan(np.zeros(400), np.arange(400), None, n_folds=5, seed=0) is None, "one type has one label"


def test_an_identity_changes_exactly_nothing():
    x, labels, groups = world(targets=2)
    for result in records_of(plan_of(labels, groups), x, x.clone()):
        assert (result["delta_sel"], result["transfer_delta"]) == (0, 0)
        assert (result["ci_low"], result["ci_high"], result["p_value"]) == (0, 0, 1)


def test_a_rotation_loses_nothing_but_does_not_transfer():
    x, labels, groups = world(rows=600, people=400)
    rotation = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(3)))[0]
    whitened = (x - x.mean(dim=0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)).T)
    plan = plan_of(labels, groups)
    result = records_of(plan, whitened, whitened @ rotation)[0]
    assert abs(result["delta_sel"]) < 0.01
    assert result["transfer_delta"] < -0.15


def test_a_reconstruction_without_the_concept_is_at_chance():
    x, labels, groups = world(rows=600, people=500)
    rng = torch.Generator().manual_seed(0)
    plan = plan_of(labels, groups)
    noise = torch.randn(x.shape, generator=rng)
    result = records_of(plan, x, noise, error_view=True)[0]
    assert result["model_sel"] > 0.65
    assert abs(result["sae_sel"] - 0.5) < 0.07
    assert result["p_value"] < 1e-3
    assert result["error_sel"] > 0.65


def test_random_labels_of_people_are_at_chance():
    found = []
    for seed in range(12):
        x, _, groups = world(rows=300, people=60, seed=seed)
        random = np.random.default_rng(seed).random((3, 60)) < 0.5
        plan = plan_of(random[:, groups], groups, seed=seed)
        fit = fit_model(plan, x, BACKEND).fit
        hits = (fit.scores.numpy() > 0) == plan.labels[:, None]
        found += [balanced_accuracy_score(y, y == h) for y, hit in zip(plan.labels, hits, strict=True) for h in hit]
    assert abs(np.mean(found) - 0.5) < 0.02


def test_row_weights_equal_repeated_rows():
    """A row of weight 2 equals two rows, in the fit and in every number except those that count rows."""
    x, labels, groups = world()
    twice = np.concatenate([np.arange(300), np.arange(0, 300, 2)])
    weights = np.where(np.arange(300) % 2 == 0, 2.0, 1.0)
    plan = plan_of(labels, groups, weights=weights)
    copied = FoldPlan(labels[:, twice], (0,), {}, groups[twice], np.ones(len(twice)), plan.folds[:, twice], 5)
    recon = damaged(x)
    weighted = records_of(plan, x, recon)[0]
    repeated = records_of(copied, x[twice], recon[twice])[0]
    for key in ("model_sel", "sae_sel", "delta_sel", "ci_low", "p_value", "C", "n_people"):
        assert weighted[key] == pytest.approx(repeated[key], rel=1e-6), key


def test_scales_are_those_of_the_training_rows():
    x, labels, groups = world()
    x[:, 2] = 0.1
    plan = plan_of(labels, groups)
    scale = training_scales(plan, x)
    for split, held_out in enumerate(plan.held_out):
        expected = x[torch.from_numpy(~held_out)].double().numpy().std(axis=0)
        expected[2] = 0
        np.testing.assert_allclose(scale[split], expected, rtol=1e-9)


def test_a_feature_that_varies_in_one_person_is_constant_in_other_folds():
    x, labels, groups = world()
    lone = torch.from_numpy(groups == groups[0])
    x[:, 4] = torch.where(lone, 1000.0, 0.0)
    plan = plan_of(labels, groups)
    scale = training_scales(plan, x)[:, 4]
    held_out = torch.from_numpy(plan.held_out)[:, lone].all(dim=1)
    assert (scale[held_out] == 0).all()
    assert (scale[~held_out] > 0).all()
    assert fit_model(plan, x, BACKEND).fit.n_unconverged.sum() == 0


def test_too_few_people_give_a_reason_in_place_of_numbers():
    x, labels, groups = world(targets=2)
    labels = np.stack([labels[0], np.isin(groups, [3, 4])])
    measured, skipped = records_of(plan_of(labels, groups), x, damaged(x))
    assert measured["delta_sel"] is not None
    assert skipped["reason"] == "the positive class has 2 groups, fewer than the 5 folds"
    assert skipped["delta_sel"] is None
    assert set(measured) - set(skipped) == set()
    json.dumps([measured, skipped])
    alone = plan_of(labels[1:], groups)
    assert isinstance(alone.skipped[0], Skipped)
    assert records_of(alone, x, x)[0]["reason"]


def test_results_follow_the_order_of_the_targets():
    x, labels, groups = world(targets=2)
    few = np.isin(groups, [3])
    plan = plan_of(np.stack([few, labels[1], few, labels[0]]), groups)
    results = measure(out_of_fold(plan, fit_model(plan, x, BACKEND), x, BACKEND))
    assert [isinstance(result, Skipped) for result in results] == [True, False, True, False]
    assert results[1].n_pos == labels[1].sum()


@settings(max_examples=40, deadline=None)
@given(
    people=st.integers(10, 80),
    rows=st.integers(60, 400),
    targets=st.integers(1, 3),
    n_folds=st.integers(2, 7),
    seed=st.integers(0, 2**31 - 1),
)
def test_no_person_is_in_two_folds(people, rows, targets, n_folds, seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, people, rows)
    folds = grouped_stratified_folds(rng.random((targets, rows)) < 0.3, groups, n_folds, seed)
    assert folds.dtype == np.int8
    assert set(folds) <= set(range(n_folds))
    for person in set(groups):
        assert len(set(folds[groups == person])) == 1


@pytest.mark.parametrize("mentions", [1, 3, 20])
def test_folds_are_balanced_in_size_and_classes(mentions):
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(600), rng.geometric(1 / mentions, 600))
    labels = (rng.random(600) < 0.2)[groups]
    labels = labels ^ (rng.random(len(groups)) < 0.05)  # a person may have rows of both classes
    folds = grouped_stratified_folds(labels, groups, 5, seed=1)
    for rows in (labels, ~labels):
        counts = np.bincount(folds[rows], minlength=5)
        assert counts.max() - counts.min() <= max(2, 0.01 * rows.sum())


def test_folds_differ_by_seed_and_only_by_seed():
    _, labels, groups = world()
    a, b, c = (grouped_stratified_folds(labels, groups, 5, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).mean() > 0.5
    plan = plan_of(labels, groups, n_repeats=3)
    assert (plan.folds[0] != plan.folds[1]).mean() > 0.5


def test_two_hundred_thousand_rows_are_split_in_seconds():
    rng = np.random.default_rng(0)
    groups, labels = rng.integers(0, 60_000, 200_000), rng.random((3, 200_000)) < 0.4
    start = time.process_time()
    folds = grouped_stratified_folds(labels, groups, 5, seed=0)
    assert time.process_time() - start < 5
    assert np.ptp(np.bincount(folds)) < 200


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        plan_of(np.zeros((1, 5), dtype=bool), np.arange(6))
    with pytest.raises(ValueError, match="folds"):
        FoldPlan.build(np.zeros((1, 5), dtype=bool), np.arange(5), None, n_folds=1, n_repeats=1, seed=0)


@pytest.mark.parametrize(
    ("sizes", "weights", "reason"),
    [
        ((290, *[1] * 10), None, "11 groups of such unequal size that they are equivalent to only 1.1 of equal size"),
        ((*[40] * 20, 19, *[1] * 5), None, "one group has most rows of the positive class"),
        ((*[10] * 20, *[10] * 20), [1e4] * 10 + [1.0] * 390, "equivalent to only 1 of equal size; 6 are needed"),
    ],
)
def test_too_few_effective_people_are_a_reason_in_place_of_numbers(sizes, weights, reason):
    persons = np.repeat(np.arange(len(sizes)), sizes)
    labels = persons >= 20 if len(sizes) > 20 else persons % 2 == 0
    plan = FoldPlan.build(labels[None], persons, weights, n_folds=5, n_repeats=1, seed=0)
    assert plan.kept == ()
    skipped = as_record(plan.skipped[0])
    assert reason in skipped["reason"]
    assert skipped["delta_sel"] is None
    assert skipped["n_people_effective"] == pytest.approx(
        effective_people(persons, None if weights is None else np.array(weights))
    )
