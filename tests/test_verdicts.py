"""Verdicts: planted reconstructions get the correct verdict."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from delta_selectivity.probing.folds import FoldPlan
from delta_selectivity.probing.probes import choose_backend
from delta_selectivity.probing.selectivity import as_record, fit_model, measure, out_of_fold
from delta_selectivity.records.sae_level import with_q_values
from delta_selectivity.records.verdicts import MARKS, verdict
from validation.world import GaussianWorld


class Measured:
    """A world, its folds and the model's probes; calling it returns the verdict for each trait of a reconstruction."""

    def __init__(self, people, signal, seed=0):
        self.world = GaussianWorld(people=people, mentions=(1, 2), d=16, signal=signal)
        self.rows = self.world.sample(np.random.default_rng(seed))
        self.backend, _ = choose_backend("torch", torch.device("cpu"))
        self.plan = FoldPlan.build(self.rows.labels, self.rows.persons, None, 5, 2, 0)
        self.model = fit_model(self.plan, self.rows.x, self.backend)

    def words(self, recon):
        found = measure(out_of_fold(self.plan, self.model, recon, self.backend))
        family = {0: {0: {str(i): as_record(result) for i, result in enumerate(found)}}}
        return [verdict(record) for record in with_q_values(family)[0][0].values()]


@pytest.fixture(scope="module")
def large():
    return Measured(3000, (1.0, 0.8))


def test_an_identity_is_preserved(large):
    assert large.words(large.rows.x.clone()) == ["preserved", "preserved"]


def test_a_rotation_is_moved(large):
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))
    assert large.words(large.rows.x @ torch.from_numpy(turn).float()) == ["moved", "moved"]


def test_an_erased_trait_is_lost_and_the_other_is_not(large):
    assert large.words(large.world.without(0, large.rows.x)) == ["lost", "preserved"]


def test_noise_with_few_people_is_undecided():
    small = Measured(150, (1.0, 0.8), seed=3)
    for seed in range(20):
        noise = torch.randn(small.rows.x.shape, generator=torch.Generator().manual_seed(seed))
        assert small.words(small.rows.x + 0.2 * noise) == ["undecided", "undecided"], seed


def test_concepts_at_chance_are_undecided():
    chance = Measured(600, (0.0,))
    assert chance.words(chance.rows.x.clone()) == ["undecided"]


RECORD = {
    "model_ci_low": 0.7, "delta_sel": -0.1, "q_value": 0.01, "preserved": False,
    "transfer_delta": -0.1, "transfer_q_value": 0.01, "transfer_preserved": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({}, "lost"),
        ({"q_value": 0.05}, "undecided"),
        ({"q_value": None}, "undecided"),
        ({"model_ci_low": 0.5}, "undecided"),
        ({"preserved": True}, "moved"),
        ({"preserved": True, "q_value": 0.5}, "moved"),
        ({"preserved": True, "transfer_preserved": True}, "preserved"),
        ({"preserved": True, "transfer_q_value": 0.2}, "preserved"),
        ({"preserved": True, "transfer_q_value": None, "transfer_delta": None}, "preserved"),
        ({"delta_sel": 0.1}, "moved"),
        ({"delta_sel": 0.1, "transfer_delta": 0.1}, "preserved"),
        ({"delta_sel": 0.1, "q_value": 0.3}, "undecided"),
        ({"reason": "too few people"}, "not measured"),
    ],
)
def test_each_rule_decides_alone(changed, word):
    assert verdict(RECORD | changed) == word


def test_the_marks_differ_without_colour():
    assert all(len(mark) == 1 for mark in MARKS.values())
    assert all(one != other for one, other in itertools.combinations(MARKS.values(), 2))
