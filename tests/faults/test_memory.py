"""Memory that runs out, in either thread: smaller pieces, the same numbers; spilled rows leave nothing behind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import people, write_csv
from runs import Request, assert_close, numbers

import row_store
from activations import LayerRows
from language_model import LanguageModel, Site
from out_of_memory import is_out_of_memory
from probe_backends import torch_lbfgs
from probe_backends.problem import ProbeProblem
from probe_backends.torch_lbfgs import TorchLbfgs

CPU_ERROR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "400000000000 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), CPU_ERROR]


def problem(rows=200, d=12, targets=3, splits=5):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(rows, d, generator=random) * torch.logspace(-2, 2, d)
    labels = x[:, :targets].T + torch.randn(targets, rows, generator=random) > 0
    weight = (torch.arange(rows) % splits != torch.arange(splits)[:, None]).double()
    scale = torch.stack([x[w > 0].std(dim=0) for w in weight])
    return ProbeProblem(x, labels, weight, scale, cs=(1e-3, 1e-1, 10.0))


def with_room_for(monkeypatch, columns, error):
    """The line search, which holds most temporaries, fails for more columns at a time."""
    search = torch_lbfgs._line_search
    widths = []

    def bounded(*args):
        widths.append(len(args[2]))
        if widths[-1] > columns:
            raise error
        return search(*args)

    monkeypatch.setattr(torch_lbfgs, "_line_search", bounded)
    return widths


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "python", "cpu"])
@pytest.mark.parametrize("room", [1, 4, 14])
def test_fits_are_split_into_columns_that_fit_and_no_number_changes(monkeypatch, caplog, room, error):
    whole = TorchLbfgs().fit(problem())
    widths = with_room_for(monkeypatch, room, error)
    backend = TorchLbfgs()
    split = backend.fit(problem())
    torch.testing.assert_close(split.coef, whole.coef, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(split.intercept, whole.intercept, rtol=1e-9, atol=1e-12)
    assert torch.equal(split.n_iter, whole.n_iter)
    assert caplog.text.count("out of memory") == 1
    failed = sum(width > room for width in widths)
    backend.fit(problem())
    assert sum(width > room for width in widths) == failed, "the size that worked is remembered"
    assert caplog.text.count("out of memory") == 1


def test_one_column_too_many_is_an_error(monkeypatch):
    with_room_for(monkeypatch, 0, MemoryError())
    with pytest.raises(MemoryError):
        TorchLbfgs().fit(problem())


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    with_room_for(monkeypatch, 4, RuntimeError("expected scalar type Double"))
    with pytest.raises(RuntimeError, match="scalar type"):
        TorchLbfgs().fit(problem())


def test_a_real_allocation_that_fails_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


def test_a_run_short_of_memory_in_both_threads_gives_the_same_numbers(
    tiny_model, tiny_saes, tmp_path, monkeypatch, caplog
):
    data = write_csv(tmp_path / "women.csv", people(80))
    ask = Request(tiny_model, (tiny_saes,), data, tmp_path / "plenty")
    assert ask.run() == 0
    forward = LanguageModel.activations

    def at_most_nine(self, ids):
        if len(ids) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, ids)

    monkeypatch.setattr(LanguageModel, "activations", at_most_nine)
    with_room_for(monkeypatch, 2, CPU_ERROR)
    assert ask.into(tmp_path / "short").run() == 0
    assert_close(numbers(tmp_path / "short"), numbers(tmp_path / "plenty"))
    assert "texts in a forward pass" in caplog.text
    assert sum("at most" in line for line in caplog.text.splitlines()) < 10, "the size that worked is remembered"
    assert "probes are fitted" in caplog.text


def spilled_store(n_rows=50, d=8):
    site = Site(0, "resid_post")
    return site, row_store.RowStore([(site, None), (site, 0)], n_rows, d, torch.device("cpu"), max_bytes=1)


def test_spilled_rows_come_back_and_their_files_have_no_names(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    site, store = spilled_store()
    with store:
        assert store.spilled
        assert list(tmp_path.iterdir()) == [], "a killed run would leave them behind"
        x, recon = torch.randn(50, 8), torch.randn(50, 8)
        none = torch.tensor(row_store.NO_MENTION)
        store.put(LayerRows(site, torch.arange(50), x, {0: recon}, {None: none, 0: none}))
        assert torch.equal(store.get(site, 0, torch.tensor([3, 1]), torch.device("cpu")), recon[[3, 1]])


def test_a_disk_too_small_for_the_rows_is_an_error_at_once(monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        spilled_store()


def test_a_run_that_spills_gives_the_same_numbers(tiny_model, tiny_saes, tmp_path):
    data = write_csv(tmp_path / "women.csv", people(80))
    ask = Request(tiny_model, (tiny_saes,), data, tmp_path / "memory")
    before = set(Path(tempfile.gettempdir()).glob("delta-selectivity-*"))
    assert ask.run() == 0
    assert ask.into(tmp_path / "files").plus("--queue_gb", "0.000001").run() == 0
    assert numbers(tmp_path / "files") == numbers(tmp_path / "memory")
    assert set(Path(tempfile.gettempdir()).glob("delta-selectivity-*")) <= before
