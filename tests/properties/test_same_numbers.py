"""Invariance of the numbers to batch size, order of texts, padding, subsets of layers, devices, and other tasks.

Selectivities and everything computed from them agree to 1e-6 absolutely; reconstruction figures, which are float32 sums
of squares in another order, to 1e-5 relatively. A score within rounding of 0 could change sign and move a selectivity
by one row; in these examples none does. Devices are those of the machine: without a GPU, the CPU by both of its names,
with one to three forward passes side by side.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

import pytest
import torch
from conftest import N_LAYERS, people, write_csv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import Request, assert_close, numbers, without_q

FEW = settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

GPUS = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
DEVICES = [("cpu", "cpu"), ("cpu:0", "cpu"), ("cpu", "cpu:0"),
           *((a, b) for a in ["cpu", *GPUS] for b in ["cpu", *GPUS] if {a, b} & {*GPUS})]  # fmt: skip
PADDINGS = ["", "Much later, and after a very long and tedious war, ", "word " * 90]


@dataclass(frozen=True)
class Guise:
    """A variant of a request that must give the same numbers."""

    batch_size: int | None
    order: int | None  # seed of the order of the rows; None: unchanged
    padding: str  # first words of another task's texts in the file, which fill up the batches; "": no such task
    layers: frozenset[int]
    devices: tuple[str, str]  # of the model and of the probes
    threads: int  # on a CPU: forward passes side by side
    queue_gb: float  # small, so that rows are spilled to files


guises = st.builds(
    Guise,
    batch_size=st.none() | st.integers(1, 90),
    order=st.none() | st.integers(0, 10**6),
    padding=st.sampled_from(PADDINGS),
    layers=st.frozensets(st.integers(0, N_LAYERS - 1), min_size=1),
    devices=st.sampled_from(DEVICES),
    threads=st.integers(1, 3),
    queue_gb=st.sampled_from([2.0, 1e-6]),
)


@pytest.fixture(scope="module")
def ask(tiny_model, tiny_saes, tmp_path_factory):
    """Return a request on 80 rows of a user's task; groups are given, so that order and padding do not change them."""
    folder = tmp_path_factory.mktemp("same")
    return Request(tiny_model, (tiny_saes,), write_csv(folder / "women.csv", people(80)), folder / "out")


@pytest.fixture(scope="module")
def expected(ask):
    assert ask.run() == 0
    return numbers(ask.out)["pythia-tiny_women.json"]


def request_for(guise, ask, folder):
    rows = people(80)
    if guise.order is not None:
        random.Random(guise.order).shuffle(rows)
    if guise.padding:  # a longer text in the batch, which pads the others
        extra = [{**row, "text": f"{guise.padding}{row['text']}", "start": "", "end": ""} for row in people(8, seed=9)]
        rows = [{**row, "task": "women"} for row in rows] + [{**row, "task": "other"} for row in extra]
    flags = ["--layers", ",".join(map(str, sorted(guise.layers))), "--queue_gb", f"{guise.queue_gb:f}"]
    flags += ["--device1", guise.devices[0], "--device2", guise.devices[1]]
    flags += [] if guise.batch_size is None else ["--batch_size", str(guise.batch_size)]
    return Request(ask.model, ask.saes, write_csv(folder / "women.csv", rows), folder / "out", (*ask.more, *flags))


def check(guise, ask, expected, tmp_path_factory):
    request = request_for(guise, ask, tmp_path_factory.mktemp("guise"))
    torch.set_num_threads(guise.threads)
    try:
        assert request.run() == 0
    finally:
        torch.set_num_threads(1)
    found = without_q(numbers(request.out)["pythia-tiny_women.json"])
    assert found.keys() == {f"layer_{layer}" for layer in guise.layers}
    for layer, record in found.items():
        cell, before = dict(record["women"]), dict(without_q(expected)[layer]["women"])
        assert abs(cell.pop("n_iter") - before.pop("n_iter")) <= 2, "rounding may cost or save the last step"
        assert_close(cell, before, relative=0, absolute=1e-6, where=f"{layer}/women")
        if not guise.padding:  # the figures cover all texts of the file
            figures = {name: value for name, value in record.items() if name != "women"}
            wanted = {name: value for name, value in expected[layer].items() if name != "women"}
            assert_close(figures, wanted, relative=1e-5, absolute=0, where=layer)


@FEW
@given(guises)
def test_the_same_numbers(ask, expected, tmp_path_factory, guise):
    check(guise, ask, expected, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_same_numbers_in_a_hundred_variants(ask, expected, tmp_path_factory, capsys):
    tried = []

    @MANY
    @given(guises)
    def try_one(guise):
        check(guise, ask, expected, tmp_path_factory)
        tried.append(guise)

    try_one()
    seen = {field.name: len({getattr(guise, field.name) for guise in tried}) for field in fields(Guise)}
    with capsys.disabled():
        print(f" [{len(tried)} guises, with so many different: {seen}]", end="")
    assert seen["batch_size"] > 10
    assert seen["order"] > 10
    assert seen["padding"] == len(PADDINGS)
    assert seen["layers"] == 2**N_LAYERS - 1
    assert seen["devices"] == len(DEVICES)
    assert (seen["threads"], seen["queue_gb"]) == (3, 2)


def test_a_dataset_has_the_same_numbers_beside_others(ask, expected, tmp_path):
    """Folds must not depend on other loaded tasks, or resuming with other --datasets would mix folds in a file."""
    company = Request(ask.model, ask.saes, ask.data, tmp_path, ask.more)
    assert company.plus("--datasets", "politics", "--shuffle_select_n", "80").run() == 0
    found = numbers(tmp_path)["pythia-tiny_women.json"]
    assert_close(without_q(found), without_q(expected), absolute=1e-6)
