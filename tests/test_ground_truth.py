"""A world whose features are known: scores of SAEs that are perfect, incomplete, or broken on purpose."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.utils.class_weight import compute_sample_weight

from benchmarks.ground_truth import rank_correlation
from benchmarks.synthetic_features import recovery
from benchmarks.synthetic_features.bench import Bench, difference
from benchmarks.synthetic_features.candidates import (
    absorbed,
    missing,
    only,
    oracle,
    random_atoms,
    rotated,
    shuffled,
    tied_topk,
)
from benchmarks.synthetic_features.training import Recipe, train
from benchmarks.synthetic_features.world import Rows, World, WorldSettings, tasks

SETTINGS = WorldSettings(seed=3, n_features=60, d=24, trees=6, rarest=0.1)


@pytest.fixture(scope="module")
def world():
    return World.build(SETTINGS)


@pytest.fixture(scope="module")
def bench(world):
    return Bench.build(world, n_truth=2000, n_rows=800, n_tasks=4, seed=0)


def test_a_world_depends_only_on_its_seed(world):
    rows, again = world.sample(50, seed=1), World.build(SETTINGS).sample(50, seed=1)
    assert torch.equal(rows.x, again.x)
    assert not torch.equal(rows.x, world.sample(50, seed=2).x)
    torch.testing.assert_close(rows.x, rows.activations @ world.directions + world.bias)


def test_children_fire_only_with_their_parents(world):
    fires = world.sample(2000, seed=5).activations > 0
    assert len(world.children) == SETTINGS.trees
    for parent, children in world.children.items():
        assert fires[:, list(children)].any()
        assert not (fires[:, list(children)] & ~fires[:, [parent]]).any()


def test_tasks_are_evenly_spaced_by_frequency(world):
    rows = world.sample(2000, seed=6)
    counts = (rows.activations > 0).sum(dim=0)
    chosen = counts[tasks(rows, 6)]
    assert torch.equal(chosen, chosen.sort(descending=True).values)
    above = (counts[None] > chosen[:, None]).sum(dim=1)
    assert (above <= torch.tensor([5, 15, 25, 35, 45, 55])).all()
    assert (above >= torch.tensor([2, 12, 20, 30, 38, 48])).all()


def test_the_oracle_ranks_first_and_transfer_detects_a_shuffled_decoder(world, bench):
    perfect = oracle(world)
    by_chance = tied_topk("random", random_atoms(world, 0), world.bias, k=4)
    candidates = [perfect, missing(world, 0.5, 0), by_chance, shuffled(perfect, 0)]
    found = [bench.probe(sae, latents_view=sae.codes is perfect.codes) for sae in candidates]
    best, incomplete, random, broken = results = [bench.result(*pair) for pair in zip(candidates, found, strict=True)]
    assert difference(found[3], found[0]).value == pytest.approx(broken.delta_sel)
    assert (best.delta_sel, best.ci_low, best.ci_high, best.transfer_delta, best.mse) == (0, 0, 0, 0, 0)
    assert (best.present, best.kept, best.held) == (1, 1, 1)
    assert best.matched == pytest.approx(1, abs=1e-6)
    assert all(result.ci_high < 0 and result.kept < 0.7 for result in (incomplete, random))
    assert broken.transfer_delta < -0.2
    assert broken.held < 0.2
    assert broken.kept > 0.9, (
        "perfect codes written in other directions can still be read, by a probe that is fitted anew"
    )
    assert abs(broken.delta_sel) < 0.03
    assert broken.latent_sel == best.latent_sel, "the codes are the same"
    assert broken.mcc == pytest.approx(1, abs=1e-6), "the directions are all there"
    assert rank_correlation(results, "delta_sel", "kept") > 0.5


def test_adversarial_saes_have_misleading_scores(world, bench):
    deceivers = rotated(world, 0), only(world, bench.features)
    turned, narrow = (bench.result(candidate, bench.probe(candidate)) for candidate in deceivers)
    assert abs(turned.delta_sel) < 0.02, "a rotation loses nothing"
    assert turned.kept == pytest.approx(1)
    assert turned.held < 0.2, "but what is there is elsewhere"
    assert turned.transfer_delta < -0.2, "and transfer sees it"
    assert narrow.delta_sel > -0.01, "what is asked for is all there"
    assert (narrow.kept_tasks, narrow.kept < 0.5) == (pytest.approx(1), True), "and little else"


def test_an_absorbed_parent_is_written_by_its_child(world):
    parent, (child, other, *_) = next(iter(world.children.items()))
    activations = torch.zeros(3, len(world.directions))
    activations[:, parent] = 1
    activations[1, child] = activations[2, [child, other]] = 1
    merged, rows = absorbed(world), Rows(activations @ world.directions + world.bias, activations)
    codes = merged.codes(rows)
    assert codes[:, parent].tolist() == [1, 0, 0], "silent beside a child"
    recon = merged.reconstruct(codes)
    torch.testing.assert_close(recon[:2], rows.x[:2])
    torch.testing.assert_close(recon[2] - rows.x[2], world.directions[parent])  # two children write it twice


def test_kept_is_invariant_to_invertible_maps(world):
    rows = world.sample(500, seed=10)
    mixing = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    kept = recovery.kept_by_feature(rows, rows.x @ mixing + 3)
    torch.testing.assert_close(kept, torch.ones_like(kept), atol=1e-4, rtol=0)
    assert recovery.kept_by_feature(rows, torch.ones_like(rows.x)).max() == 0
    pure = torch.randn(rows.x.shape, generator=torch.Generator().manual_seed(2))
    assert recovery.kept_by_feature(rows, pure).mean() < 0.02, "adjusted for chance"


def test_present_equals_weighted_least_squares_of_scikit_learn(world):
    rows = world.sample(2000, seed=10)
    noise = torch.randn(rows.x.shape, generator=torch.Generator().manual_seed(2))
    views = {"noisy": rows.x + noise, "x": rows.x}
    told = {}
    for name, view in views.items():
        by_feature = []
        for there in (rows.activations > 0).T.numpy():
            weight = compute_sample_weight("balanced", there)
            r2 = LinearRegression().fit(view, there, sample_weight=weight).score(view, there, sample_weight=weight)
            freedom = weight.sum() ** 2 / (weight**2).sum() - 1
            by_feature.append(max(0, 1 - (1 - r2) * freedom / (freedom - view.shape[1])))
        told[name] = sum(by_feature)
    assert recovery.present_share(rows, views["noisy"]) == pytest.approx(told["noisy"] / told["x"], rel=1e-4)
    mixing = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    assert recovery.present_share(rows, rows.x @ mixing + 3) == pytest.approx(1, abs=1e-6)
    assert recovery.present_share(rows, torch.ones_like(rows.x)) == 0
    assert recovery.present_share(rows, noise) < 0.02


def test_held_is_invariant_only_to_scale_and_constant(world):
    rows = world.sample(500, seed=7)
    held = recovery.held_by_feature(rows, 0.3 * rows.x + 5, world.directions)
    torch.testing.assert_close(held, torch.ones_like(held), atol=1e-5, rtol=0)
    noise = torch.randn(rows.x.shape, generator=torch.Generator().manual_seed(0))
    assert (recovery.held_by_feature(rows, rows.x + noise, world.directions).mean()) < 0.8
    assert recovery.held_by_feature(rows, torch.zeros_like(rows.x), world.directions).max() == 0
    assert recovery.held_by_feature(rows, -rows.x, world.directions).max() == 0


def test_matched_depends_on_direction_and_activation(world):
    rows = world.sample(500, seed=8)
    codes, atoms = rows.activations, world.directions
    whole = recovery.matched_by_feature(rows, codes, atoms, atoms)
    torch.testing.assert_close(whole, torch.ones_like(whole), atol=1e-5, rtol=0)
    order = torch.randperm(len(atoms), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(recovery.matched_by_feature(rows, codes[:, order], atoms[order], atoms), whole)
    assert recovery.matched_by_feature(rows, codes, atoms[order], atoms).mean() < 0.2


def test_training_finds_more_with_more_steps(world):
    x = world.sample(4096, seed=9).x
    untrained, trained = (train(Recipe("topk", 60, steps, {"k": 5}), x, seed=0) for steps in (8, 200))
    errors = [float((sae(x) - x).square().mean()) for sae in (untrained, trained)]
    assert errors[1] < 0.5 * errors[0]
