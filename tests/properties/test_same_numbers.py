"""What may not change a number does not: batch size, order of texts, padding, layer subsets, company.

Selectivities and everything made from them agree to 1e-6 absolutely; reconstruction figures, which are float32 sums
of squares in another order, to 1e-5 relatively. A score within rounding of 0 could fall on the other side and move a
selectivity by one row; in these examples none does.
"""

from __future__ import annotations

import random

import pytest
from conftest import N_LAYERS, people, write_csv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import Request, assert_close, numbers

FEW = settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

batch_sizes = st.none() | st.integers(1, 90)
orders = st.none() | st.integers(0, 10**6)
paddings = st.sampled_from(["", "Much later, and after a very long and tedious war, ", "word " * 90])
layer_sets = st.sets(st.integers(0, N_LAYERS - 1), min_size=1)


@pytest.fixture(scope="module")
def ask(tiny_model, tiny_saes, tmp_path_factory):
    """80 rows of a task of the user's; people are given, so that no order and no padding changes them."""
    folder = tmp_path_factory.mktemp("same")
    return Request(tiny_model, (tiny_saes,), write_csv(folder / "women.csv", people(80)), folder / "out")


@pytest.fixture(scope="module")
def expected(ask):
    assert ask.run() == 0
    return numbers(ask.out)["pythia-tiny_women.json"]


def without_q(layers):
    """q values rest on all layers of a file: where there are fewer, they may differ."""
    return {
        layer: {
            name: {k: v for k, v in value.items() if k != "q_value"} if isinstance(value, dict) else value
            for name, value in record.items()
        }
        for layer, record in layers.items()
    }


def variant(ask, folder, batch_size, order, padding, layers):
    """The same task in another guise: rows shuffled, a long text of another task beside it, fewer layers."""
    rows = people(80)
    if order is not None:
        random.Random(order).shuffle(rows)
    data = write_csv(folder / "women.csv", rows)
    flags = ["--layers", ",".join(map(str, sorted(layers)))]
    flags += [] if batch_size is None else ["--batch_size", str(batch_size)]
    if padding:  # a longer text in the batch pads the others
        extra = [{**row, "text": f"{padding}{row['text']}", "start": "", "end": ""} for row in people(8, seed=9)]
        tasks = [{**row, "task": "women"} for row in rows] + [{**row, "task": "other"} for row in extra]
        data = write_csv(folder / "women.csv", tasks)
    return Request(ask.model, ask.saes, data, folder / "out", (*ask.more, *flags))


def check(ask, expected, tmp_path_factory, batch_size, order, padding, layers):
    request = variant(ask, tmp_path_factory.mktemp("variant"), batch_size, order, padding, layers)
    assert request.run() == 0
    found = without_q(numbers(request.out)["pythia-tiny_women.json"])
    assert found.keys() == {f"layer_{layer}" for layer in layers}
    for layer, record in found.items():
        cell, before = record["women"], without_q(expected)[layer]["women"]
        assert_close(cell, before, relative=0, absolute=1e-6, where=f"{layer}/women")
        if not padding:  # the figures are over all texts of the file
            figures = {name: value for name, value in record.items() if name != "women"}
            wanted = {name: value for name, value in expected[layer].items() if name != "women"}
            assert_close(figures, wanted, relative=1e-5, absolute=0, where=layer)


@FEW
@given(batch_sizes, orders, paddings, layer_sets)
def test_the_same_numbers(ask, expected, tmp_path_factory, batch_size, order, padding, layers):
    check(ask, expected, tmp_path_factory, batch_size, order, padding, layers)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@MANY
@given(batch_sizes, orders, paddings, layer_sets)
def test_the_same_numbers_in_a_hundred_guises(ask, expected, tmp_path_factory, batch_size, order, padding, layers):
    check(ask, expected, tmp_path_factory, batch_size, order, padding, layers)


def test_a_dataset_has_the_same_numbers_in_company(ask, expected, tmp_path):
    """Its folds may not depend on who else is loaded, or a file resumed with other --datasets would be a mixture."""
    company = Request(ask.model, ask.saes, ask.data, tmp_path, ask.more)
    assert company.plus("--datasets", "politics", "--shuffle_select_n", "80").run() == 0
    assert_close(numbers(tmp_path)["pythia-tiny_women.json"], expected, absolute=1e-6)
