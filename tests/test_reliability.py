"""The reliability benchmark: k-sparse probing compared with a plain loop, paired differences, draws, pair counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score, roc_auc_score

from benchmarks.paired_scores import (
    RELIABLE,
    Errors,
    PairCount,
    by_partition,
    difference,
    fvu_difference,
    noise_of_differences,
    noise_of_folds,
    noise_of_runs,
)
from benchmarks.probe_draws import draw_people, rows_of_people
from benchmarks.sae_families import STUDIES, TINY_PYTHIA, Recipe, as_sae, close_variants, train
from benchmarks.sae_panel import pair_sets, panel
from delta_selectivity.probing.probe_statistics import ProbeScores, auc_parts, correct, r2_parts


def probe_scores(random, labels, persons, strength):
    scores = random.normal(size=(5, len(labels))) + strength * (labels - 0.5)
    folds = np.zeros((5, len(labels)), dtype=np.int8)
    views = {"model": scores.astype(np.float16), "sae": scores.astype(np.float16)}
    return ProbeScores(views, labels, persons, np.ones(len(labels)), folds)


def test_the_difference_equals_that_of_the_mean_scores():
    random, persons = np.random.default_rng(0), np.repeat(np.arange(200), 2)
    labels = [random.random(400) > share for share in (0.4, 0.6)]
    strong, weak = ([probe_scores(random, y, persons, s) for y in labels] for s in (2.0, 0.5))
    for parts in (correct, auc_parts):
        gain = difference(*([parts(p, "sae") for p in probes] for probes in (strong, weak)), strong)
        assert gain.value == pytest.approx(
            np.mean(by_partition(strong, "sae", parts) - by_partition(weak, "sae", parts))
        )
        assert gain.low > 0
    by_sklearn = [[roc_auc_score(p.labels, row) for row in p.views["sae"]] for p in strong]
    np.testing.assert_allclose(by_partition(strong, "sae", auc_parts), np.mean(by_sklearn, axis=0))
    hits = [correct(p, "sae") for p in strong]
    same = difference(hits, hits, strong)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_r2_and_its_error_equal_resampling_of_people():
    random, persons = np.random.default_rng(0), np.repeat(np.arange(150), 2)
    labels = np.arange(300) % 2 == 0  # equal classes: the balanced mean is the mean
    found = probe_scores(random, labels, persons, strength=2.0)
    noise = (0.1 + random.random(150))[persons] * random.normal(size=(5, 300))
    found.views["transfer"] = (found.views["model"] + noise).astype(np.float16)
    exact = {view: scores.astype(np.float64) for view, scores in found.views.items()}
    by_sklearn = [r2_score(exact["model"][r], exact["transfer"][r]) for r in range(5)]
    np.testing.assert_allclose(by_partition([found], "transfer", r2_parts), by_sklearn, rtol=1e-6)
    assert r2_parts(found, "model") == pytest.approx(1)
    spread = []
    for _ in range(1000):
        rows = np.concatenate([[2 * p, 2 * p + 1] for p in random.integers(150, size=150)])
        model, copy = exact["model"][:, rows], exact["transfer"][:, rows]
        spread.append(np.mean([r2_score(m, c) for m, c in zip(model, copy, strict=True)]))
    parts = r2_parts(found, "transfer").mean(axis=0, keepdims=True)  # one partition: only the error due to people
    assert difference([parts], [0 * parts], [found]).standard_error == pytest.approx(np.std(spread), rel=0.1)


def test_the_error_of_an_fvu_difference_equals_resampling_of_clusters():
    random = np.random.default_rng(0)
    clusters = np.repeat(np.arange(150), random.integers(1, 8, 150))
    deviation = random.exponential(size=len(clusters)) + random.exponential(size=150)[clusters]
    a = Errors(deviation * random.uniform(0.1, 0.4, len(clusters)), deviation, clusters)
    b = Errors(deviation * random.uniform(0.1, 0.3, len(clusters)), deviation, clusters)
    found = fvu_difference(a, b)
    assert found.value == pytest.approx((a.error.sum() - b.error.sum()) / deviation.sum())
    rows = [np.flatnonzero(clusters == c) for c in range(150)]
    resampled = []
    for _ in range(2000):
        units = np.concatenate([rows[c] for c in random.integers(150, size=150)])
        resampled.append(a.of(units).fvu - b.of(units).fvu)
    assert found.standard_error == pytest.approx(np.std(resampled), rel=0.1)


def test_pairs_are_counted_by_sign_interval_and_noise():
    gains = [(0.03, 0.02, 0.04), (0.01, -0.01, 0.03), (-0.01, -0.03, 0.01), (-0.02, -0.03, -0.01), (0.0, 0.0, 0.0)]
    assert PairCount.of(gains, noise=0.01) == PairCount(pairs=5, right=2, sure=1, sure_and_wrong=1, beyond_noise=1)
    assert PairCount.of(gains, noise=0.011).beyond_noise == 0


def test_noise_is_pooled_and_shared_noise_cancels():
    shared = [0.0, 1.0, 2.0, 3.0, 4.0]  # SD 1.58
    runs = {"a": shared, "b": [5 + 2 * value for value in shared]}
    assert noise_of_runs(runs) == pytest.approx(np.sqrt((2.5 + 10) / 2))
    assert noise_of_differences(runs) == pytest.approx(np.sqrt(2.5))
    assert noise_of_differences({"a": shared, "b": [5 + value for value in shared]}) == 0
    assert pytest.approx(2.77, abs=0.005) == RELIABLE


def test_noise_of_folds_is_that_of_a_mean_over_partitions():
    random = np.random.default_rng(0)
    seeds_by_partitions = random.normal(size=(4000, 5))
    expected = seeds_by_partitions.mean(axis=1).std()
    assert noise_of_folds(list(seeds_by_partitions)) == pytest.approx(expected, rel=0.03)


def test_people_are_resampled_whole_and_with_replacement():
    persons = np.array([4, 4, 9, 2, 2, 2])
    drawn = rows_of_people(np.array([9, 4, 7, 4, 2, 9]), persons, 8)  # person 7 has no row here
    assert drawn.tolist() == [2, 0, 1, 0, 1, 3, 4, 5]
    assert rows_of_people(np.array([2, 2]), persons, 4).tolist() == [3, 4, 5, 3]
    with pytest.raises(ValueError, match="3 of 4 rows"):
        rows_of_people(np.array([2]), persons, 4)


def test_people_are_drawn_evenly():
    turns = draw_people(np.repeat(np.arange(500), 3), np.random.default_rng(0))
    counts = np.bincount(turns, minlength=500)
    assert counts.sum() == 2500
    assert counts.var() == pytest.approx(5, rel=0.2)  # Poisson except for the fixed sum


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_snapshots_improve_during_training(architecture):
    random = torch.Generator().manual_seed(0)
    features = torch.randn(48, 16, generator=random)
    acts = (torch.rand(8192, 48, generator=random) * (torch.rand(8192, 48, generator=random) < 0.06)) @ features
    recipe = Recipe(architecture, k=3, d_sae=64, steps=60, seed=0, snapshots=(5, 20))
    fvu = {}
    for step, weights in train(recipe, acts):
        sae = as_sae(recipe, weights)
        codes = sae.encode(acts)
        fvu[step] = float((acts - sae.decode(codes)).square().sum() / (acts - acts.mean(0)).square().sum())
        assert float(codes.l0().mean()) == pytest.approx(3, rel=0.05)
    assert list(fvu) == [5, 20, 60]
    assert fvu[60] < fvu[20] < fvu[5]


def test_a_seed_repeats_its_training_exactly():
    acts = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    recipe = Recipe("topk", k=3, d_sae=32, steps=4, seed=5)
    (_, once), (_, again) = (next(train(recipe, acts)) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_close_variants_differ_in_one_thing():
    base = TINY_PYTHIA.member("TopK, k 32", 0)
    sizes = {change: [(r.k, r.d_sae, r.steps) for r in pair] for change, pair in close_variants(base).items()}
    assert sizes == {
        "k x 7/8": [(28, 1024, base.steps), (32, 1024, base.steps)],
        "width x 1.25": [(32, 1024, base.steps), (32, 1280, base.steps)],
        "10 % less training": [(32, 1024, base.steps * 9 // 10), (32, 1024, base.steps)],
    }


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_sae_of_a_pair_is_in_the_panel_once(study):
    names = [snapshot.name for snapshot in panel(study)]
    assert len(names) == len(set(names))
    assert {s.name for each in pair_sets(study) for pair in each.pairs for s in pair} == set(names)
    assert study.snapshots[-1] == study.steps
    for each in pair_sets(study):
        assert all(worse.name != better.name for worse, better in each.pairs)
