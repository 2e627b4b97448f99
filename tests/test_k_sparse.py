"""k-sparse probes: compared with a plain scikit-learn loop, with sae-probes on its own split, and in a run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import people, write_csv
from runs import Request, files
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from benchmarks import k_sparse_agreement
from delta_selectivity.probing import k_sparse
from delta_selectivity.probing.folds import FoldPlan
from delta_selectivity.probing.probes import choose_backend
from delta_selectivity.probing.selectivity import as_record, fit_model, measure, out_of_fold
from delta_selectivity.records.result_file import read


@pytest.fixture(scope="module")
def world():
    """Return 300 rows of 100 people and 40 latents of unequal size and rarity, three of which predict the labels."""
    random = np.random.default_rng(0)
    persons = np.repeat(np.arange(100), 3)
    labels = random.random((2, 100))[:, persons] > np.array([[0.5], [0.7]])
    dense = random.exponential(size=(300, 40)) * np.geomspace(0.1, 10, 40)
    dense[random.random(dense.shape) > np.linspace(0.05, 0.6, 40)] = 0
    dense[:, 3] = labels[0] * random.exponential(size=300)
    dense[:, 7] = (labels[1] + 0.2) * (random.random(300) > 0.5)
    dense[:, 11] = labels[0] * (random.random(300) > 0.8) * 0.01  # rare and small, but always right
    dense = dense.astype(np.float32).astype(np.float64)
    return dense, labels, persons, FoldPlan.build(labels, persons, None, 5, 2, 0)


def as_csr(dense):
    return torch.from_numpy(dense).float().to_sparse_csr()


def by_scikit_learn(dense, labels, folds, fold, k, c, weights=None):
    """Return (held-out rows, their scores): the loop of sae_probes.run_sae_evals on one training fold."""
    weights = np.ones(len(labels)) if weights is None else weights
    train_rows, test_rows = folds != fold, folds == fold
    x, y, w = dense[train_rows], labels[train_rows], weights[train_rows, None]
    x = x / ((w * np.abs(x)).sum(0) / ((w * (x != 0)).sum(0) + 1e-6) + 1e-6)
    means = [(w * x)[y == side].sum(0) / w[y == side].sum() for side in (True, False)]
    best = np.argsort(-np.abs(means[0] - means[1]), kind="stable")[:k]
    w = w[:, 0] * np.where(y, w.sum() / 2 / w[y].sum(), w.sum() / 2 / w[~y].sum())
    probe = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(dense[train_rows][:, best], y, sample_weight=w)
    return test_rows, probe.decision_function(dense[test_rows][:, best])


@pytest.mark.parametrize("c", [0.01, 100.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_k_sparse_probes_equal_a_plain_loop(world, c, weighted):
    dense, labels, persons, plan = world
    weights = np.random.default_rng(1).random(300) + 0.2 if weighted else np.ones(300)
    plan = FoldPlan.build(labels, persons, weights, 5, 2, 0)
    found = k_sparse.k_sparse_fit(plan, as_csr(dense), ks=(1, 5), cs=(c,))
    assert [fact.n_unconverged.tolist() for fact in found.facts] == [[0, 0]] * 2
    for i, k in enumerate((1, 5)):
        for t in range(2):
            for repeat, folds in enumerate(plan.folds):
                for fold in range(5):
                    rows, expected = by_scikit_learn(dense, labels[t], folds, fold, k, c, weights)
                    np.testing.assert_allclose(found.scores[i, t, repeat, rows], expected, rtol=1e-3, atol=1e-4)


def test_duplicate_entries_are_summed(world):
    dense, _, _, plan = world
    csr = as_csr(dense)
    halves = csr.values().repeat_interleave(2) / 2
    twice = torch.sparse_csr_tensor(
        2 * csr.crow_indices(), csr.col_indices().repeat_interleave(2), halves, csr.shape, check_invariants=False
    )
    ours, theirs = (k_sparse.k_sparse_fit(plan, codes, ks=(5,)).scores for codes in (csr, twice))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_k_sparse_probes_hold_out_people(world):
    """One latent per person predicts labels that are random by person, if the person was in the training rows."""
    _, _, persons, _ = world
    labels = (np.random.default_rng(1).random(100) > 0.5)[None, persons]
    plan = FoldPlan.build(labels, persons, None, 5, 5, 0)
    scores = k_sparse.k_sparse_fit(plan, as_csr(np.eye(100)[persons]), ks=(16,)).scores
    hits = (scores[0, 0] > 0) == labels[0]
    assert abs(np.mean([hits[:, labels[0] == side].mean() for side in (True, False)]) - 0.5) < 0.1


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_a_probe_that_does_not_converge_is_only_a_warning(world, factor):
    dense, _, _, plan = world
    found = k_sparse.k_sparse_fit(plan, as_csr(dense * factor), ks=(1, 16))
    assert np.isfinite(found.scores).all()
    with pytest.raises(ArithmeticError, match="NaN or Inf"):
        k_sparse.k_sparse_fit(plan, as_csr(np.where(dense > 0, np.inf, 0)), ks=(1,))


def test_records_have_selectivity_interval_and_auc_by_k(world):
    dense, labels, _, plan = world
    backend, _ = choose_backend("torch", "cpu")
    x = torch.from_numpy(dense).float()
    plain = out_of_fold(plan, fit_model(plan, x, backend), x * 0.9, backend)
    found = k_sparse.with_k_sparse(plain, as_csr(dense))
    assert found.views == ("model", "sae", "transfer", "k1", "k2", "k5", "k16")
    without, with_k = ([as_record(result) for result in measure(one)] for one in (plain, found))
    for t in range(2):
        assert without[t] == {name: with_k[t][name] for name in without[t]} | {"n_iter": without[t]["n_iter"]}
        for k in (1, 2, 5, 16):
            scores = found.probe(t).views[f"k{k}"]
            record = {name: with_k[t][f"k{k}_{name}"] for name in ("sel", "ci_low", "ci_high", "auc")}
            assert record["sel"] == pytest.approx(np.mean([balanced_accuracy_score(labels[t], s > 0) for s in scores]))
            assert record["auc"] == pytest.approx(np.mean([roc_auc_score(labels[t], s) for s in scores]))
            assert record["ci_low"] < record["sel"] < record["ci_high"]


def test_a_run_measures_the_view(tiny_model, tiny_saes, tmp_path):
    data = write_csv(tmp_path / "women.csv", [{**row, "task": "women"} for row in people(120)])
    flags = ("--folds", "3", "--repeats", "2", "--layers", "1", "--baselines", "random,pca")
    for name, views in (("plain", "sae"), ("sparse", "ksparse")):
        assert Request(tiny_model, (tiny_saes,), data, tmp_path / name, (*flags, "--views", views)).run() == 0
    plain, sparse = (
        {found["_run"]["config"].get("baseline"): found["layer_1"]["women"] for found in map(read, files(folder))}
        for folder in (tmp_path / "plain", tmp_path / "sparse")
    )
    assert {kind for kind, record in sparse.items() if "k5_sel" in record} == {None, "random"}, "PCA has no latents"
    assert sparse[None]["delta_sel"] == plain[None]["delta_sel"]
    assert 0.5 <= sparse[None]["k16_sel"] <= 1
    assert "latent_sel" not in sparse[None]


@pytest.mark.parametrize("task", ["117_us_state_FL", "130_temp_cat_Frequency"])
def test_probes_agree_with_sae_probes_on_its_own_split(task):
    check_agreement([task])


@pytest.mark.slow
def test_probes_agree_with_sae_probes_on_ten_tasks():
    check_agreement(list(k_sparse_agreement.theirs()))


def check_agreement(tasks):
    for line in k_sparse_agreement.compared(tasks):
        assert line.overlap >= 0.9 * line.k, line
        assert abs(line.auc - line.their_auc) <= 0.005, line
        assert abs(line.accuracy - line.their_accuracy) <= 0.005, line
