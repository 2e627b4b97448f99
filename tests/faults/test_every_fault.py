"""A fault at every point of a run: it ends with a message, keeps finished results, and the next run completes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import people, write_csv, write_sparsify
from injector import POINTS, Injector, fault
from runs import Request, assert_close, files, left_over, numbers, scores_of, substance

MAX_CALLS = 200  # maximum number of calls of one kind in one run


@pytest.fixture(scope="module")
def request_(tiny_model, tiny_saes, tmp_path_factory):
    """Return a request with two layers, two SAEs and two batches of texts."""
    folder = tmp_path_factory.mktemp("faults")
    data = write_csv(folder / "women.csv", people(60))
    other = write_sparsify(folder / "sae-sparser", layers=[0, 1], k=2)
    flags = ("--folds", "3", "--repeats", "1", "--layers", "0,1", "--batch_size", "40")
    return Request(tiny_model, (tiny_saes, other), data, folder / "undisturbed", flags)


@pytest.fixture(scope="module")
def undisturbed(request_):
    assert request_.run() == 0
    return substance(request_.out), scores_of(request_.out)


def layers_on_disk(folder: Path) -> dict[tuple[str, str], float]:
    """Return (file, layer) -> one of its numbers."""
    return {
        (path, name): layer["mse_whole"] for path, found in numbers(folder).items() for name, layer in found.items()
    }


def walk(kind, error, request_, undisturbed, tmp_path, capsys):
    """Let the n-th call fail for n = 1, 2, ...; return and print the number of calls."""
    for n in range(1, MAX_CALLS):
        ask = request_.into(tmp_path / str(n))
        finished: dict[tuple[str, str], float] = {}
        injector = Injector(
            error, n, on_fault=lambda ask=ask, finished=finished: finished.update(layers_on_disk(ask.out))
        )
        with fault(kind, injector):
            code = ask.run()
        if not injector.hit:
            assert code == 0
            assert (substance(ask.out), scores_of(ask.out)) == undisturbed
            with capsys.disabled():
                print(f" [{kind}: {n - 1} points]", end="")
            return n - 1
        where = f"{kind}, call {n}"
        told = [
            line
            for line in capsys.readouterr().err.splitlines()
            if line.startswith(("failed: ", "error: ", "interrupted: "))
        ]
        if (
            code == 0
        ):  # the run continued, for example with less memory: nothing may be missing, and no number may differ
            assert_close(numbers(ask.out), numbers(request_.out), where=where)
        else:
            assert code in {1, 2, 130}, where
            assert len(told) == 1, f"{where}: {told}"
        assert finished.items() <= layers_on_disk(ask.out).items(), f"{where}: a finished layer is lost"
        assert left_over(ask.out) == [], where
        assert ask.run() == 0, where
        if code != 0:
            assert (substance(ask.out), scores_of(ask.out)) == undisturbed, f"{where}: the next run gives other numbers"
    raise AssertionError(f"{kind}: still going after {MAX_CALLS} calls")


@pytest.mark.parametrize("kind", POINTS)
def test_a_run_survives_a_fault_at_every_call(kind, request_, undisturbed, tmp_path, capsys):
    assert walk(kind, POINTS[kind][2], request_, undisturbed, tmp_path, capsys) >= 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, OSError, ValueError])
@pytest.mark.parametrize("kind", POINTS)
def test_other_errors_are_survived_too(kind, error, request_, undisturbed, tmp_path, capsys):
    assert walk(kind, error, request_, undisturbed, tmp_path, capsys) >= 1


def test_the_injector_counts_every_write(request_, tmp_path):
    """The injector counts the scores and results of two SAEs x two layers, and two files at the end."""
    injector = Injector(RuntimeError, n=None)
    with fault("replace", injector):
        assert request_.into(tmp_path / "out").run() == 0
    assert injector.calls == 10
    assert all(json.loads(path.read_text()) for path in files(tmp_path / "out"))
