"""Labels that mean nothing: what duplicates and people on both sides of a split make of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.leakage import Rows, compare
from probes import choose_backend

N_PEOPLE, MENTIONS, COPIES, D = 80, 4, 2, 64


@pytest.fixture(scope="module")
def found():
    """A coin for each person as the label, activations that tell the person, every row shipped twice."""
    random = np.random.default_rng(0)
    persons = np.repeat(np.arange(N_PEOPLE), MENTIONS)
    labels = (random.permutation(N_PEOPLE) % 2 == 0)[persons]
    x = random.normal(size=(N_PEOPLE, D))[persons] + random.normal(size=(len(persons), D))
    distinct = Rows(torch.from_numpy(x).float(), labels[None], persons)
    shipped = Rows(distinct.x.repeat(COPIES, 1), np.tile(labels, (1, COPIES)), np.tile(persons, COPIES))
    backend, _ = choose_backend("torch", "cpu")
    (leakage,) = compare(["coin"], shipped, distinct, backend)
    return leakage


def test_what_cannot_be_known_is_known_by_heart(found):
    assert found.by_person.value == pytest.approx(0.5, abs=0.1)
    assert found.distinct.value > found.by_person.value + 0.1
    assert found.shipped.value > found.distinct.value + 0.03


def test_the_worth_of_the_people_is_the_difference_of_the_splits(found):
    assert found.persons_share.value == pytest.approx(found.distinct.value - found.by_person.value)
    assert 0 < found.persons_share.low < found.persons_share.value < found.persons_share.high


def test_rows_and_people_are_counted(found):
    assert (found.n_shipped, found.n_distinct, found.n_people) == (640, 320, 80)


def test_an_error_by_row_is_too_small(found):
    """Rows of a person are told right or wrong together."""
    assert found.row_standard_error < 0.9 * found.person_standard_error
