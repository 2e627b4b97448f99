"""Lack of memory in either thread: smaller pieces and the same numbers; spilled rows leave no files."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import people, write_csv
from runs import Request, assert_close, numbers

from delta_selectivity.models.language_model import LanguageModel, Site
from delta_selectivity.probing import c_path, selectivity
from delta_selectivity.probing.backends import lbfgs, torch_dense
from delta_selectivity.probing.backends.problem import ProbeProblem
from delta_selectivity.probing.backends.torch_lbfgs import TorchLbfgs
from delta_selectivity.run import row_store
from delta_selectivity.run.activations import LayerRows
from delta_selectivity.system.out_of_memory import MemoryBudget, is_out_of_memory

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
    """Let the line search, which holds most temporaries, fail for more columns at a time."""
    search = lbfgs._line_search
    widths = []

    def bounded(*args):
        widths.append(len(args[2]))
        if widths[-1] > columns:
            raise error
        return search(*args)

    monkeypatch.setattr(torch_dense.DenseColumns, "for_kernel", lambda *args: None)  # it has its own search
    monkeypatch.setattr(lbfgs, "_line_search", bounded)
    return widths


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "python", "cpu"])
@pytest.mark.parametrize("room", [1, 4, 14])
def test_splitting_fits_by_columns_changes_no_number(monkeypatch, caplog, room, error):
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


def test_splitting_sparse_fits_changes_no_number(monkeypatch, caplog):
    dense = problem()
    task = replace(dense, x=(dense.x * (dense.x.abs() > dense.x.std(dim=0) / 2)).to_sparse_csr())
    whole = TorchLbfgs().fit(task)
    with_room_for(monkeypatch, 4, CPU_ERROR)
    split = TorchLbfgs().fit(task)
    torch.testing.assert_close(split.coef, whole.coef, rtol=1e-6, atol=1e-9)
    assert torch.equal(split.n_iter, whole.n_iter)
    assert "out of memory" in caplog.text


def test_a_single_column_that_does_not_fit_is_an_error(monkeypatch):
    with_room_for(monkeypatch, 0, MemoryError())
    with pytest.raises(MemoryError):
        TorchLbfgs().fit(problem())


def test_other_errors_do_not_count_as_out_of_memory(monkeypatch):
    with_room_for(monkeypatch, 4, RuntimeError("expected scalar type Double"))
    with pytest.raises(RuntimeError, match="scalar type"):
        TorchLbfgs().fit(problem())


def test_a_real_allocation_failure_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "python", "cpu"])
@pytest.mark.parametrize(("n", "room"), [(1, 1), (7, 1), (8, 3), (13, 5), (100, 100), (100, 33)])
def test_work_in_pieces_covers_everything_once_and_remembers_the_size(caplog, n, room, error):
    done, tried = [], []

    def work(piece):
        tried.append(piece.stop - piece.start)
        if tried[-1] > room:
            raise error
        done.extend(range(n)[piece])

    known = MemoryBudget("rows are scored")
    known.run_in_pieces(n, 4, work)
    assert done == list(range(n))
    assert caplog.text.count("out of memory: rows are scored") == (n > room)
    del done[:], tried[:]
    known.run_in_pieces(n, 4, work)
    assert done == list(range(n))
    assert max(tried) <= room
    largest, tried[:] = max(tried), []
    known.run_in_pieces(n, 8, work)
    assert max(tried) == (n if n <= room else max(1, largest // 2)), "twice the cells a unit: half as many units"
    assert caplog.text.count("out of memory") == (n > room)


def test_work_in_pieces_raises_other_errors_and_indivisible_work():
    def fail(piece):
        raise error

    for error in (MemoryError(), RuntimeError("expected scalar type Double")):
        with pytest.raises(type(error)):
            MemoryBudget("rows are scored").run_in_pieces(1, 1, fail)
    calls = []
    with pytest.raises(RuntimeError, match="scalar type"):
        MemoryBudget("rows are scored").run_in_pieces(8, 1, lambda piece: calls.append(piece) or fail(piece))
    assert calls == [slice(0, 8)]


def test_lack_of_memory_in_both_threads_changes_no_number(tiny_model, tiny_saes, tmp_path, monkeypatch, caplog):
    data = write_csv(tmp_path / "women.csv", people(80))
    ask = Request(tiny_model, (tiny_saes,), data, tmp_path / "plenty")
    assert ask.run() == 0
    forward = LanguageModel.activations

    def at_most_nine(self, ids, *tokens):
        if len(ids) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, ids, *tokens)

    monkeypatch.setattr(LanguageModel, "activations", at_most_nine)
    with_room_for(monkeypatch, 2, CPU_ERROR)
    assert ask.into(tmp_path / "short").run() == 0
    short, plenty = numbers(tmp_path / "short"), numbers(tmp_path / "plenty")
    assert_close(short, plenty)
    assert "texts in a batch" in caplog.text
    assert sum("at most" in line for line in caplog.text.splitlines()) < 10, "the size that worked is remembered"
    assert "probes are fitted" in caplog.text


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "python", "cpu"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("step", ["transfer", "losses"])
def test_scoring_targets_in_pieces_changes_no_number(monkeypatch, caplog, step, sparse, error):
    random = np.random.default_rng(0)
    labels = random.normal(size=(5, 120)) > 0
    plan = selectivity.FoldPlan.build(labels, np.arange(120) // 2, None, n_folds=3, n_repeats=2, seed=0)
    x = torch.from_numpy(random.normal(size=(120, 7)).astype(np.float32)).relu()
    one = torch.ones(len(plan.held_out), 7, dtype=torch.float64)
    backend = TorchLbfgs()

    def scored():
        fit = selectivity.fit_view(plan, x.to_sparse_csr() if sparse else x, one, backend)
        return fit, selectivity.transfer_scores(plan, fit, x)

    whole, transfer = scored()
    module, name = (selectivity, "_held_out_scores") if step == "transfer" else (c_path, "out_of_fold_losses")
    work, widths = getattr(module, name), []

    def at_most_two(plan, given, *args):
        widths.append(args[0].shape[0] if step == "transfer" else given.shape[1])
        if widths[-1] > 2:
            raise error
        return work(plan, given, *args)

    monkeypatch.setattr(module, name, at_most_two)
    monkeypatch.setattr(module, "_BUDGET", MemoryBudget("targets are scored"))
    pieces, transfer_in_pieces = scored()
    assert widths[:3] == [5, 2, 2]
    torch.testing.assert_close(pieces.scores, whole.scores, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(transfer_in_pieces, transfer, rtol=1e-6, atol=1e-7)
    assert (pieces.chosen_c == whole.chosen_c).all()
    torch.testing.assert_close(pieces.coef, whole.coef)
    assert caplog.text.count("out of memory: targets are scored 2 at a time") == 1


SITE = Site(0, "resid_post")
GPU = torch.device("cuda", 0)


def store_of(n_rows=50, d=8, device="cpu", max_bytes=1 << 20):
    return row_store.RowStore({(SITE, None): d, (SITE, 0): d}, n_rows, torch.device(device), max_bytes)


def batch_of(x, recon):
    none = torch.tensor(row_store.NO_MENTION)
    return LayerRows(SITE, torch.arange(len(x)), x, {0: recon}, {None: none, 0: none})


def test_spilled_rows_are_read_back_from_unnamed_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with store_of(max_bytes=1) as store:
        assert store.place == "files"
        assert list(tmp_path.iterdir()) == [], "a killed run would leave them behind"
        x, recon = torch.randn(50, 8), torch.randn(50, 8)
        store.put(batch_of(x, recon))
        assert torch.equal(store.get(SITE, 0, torch.tensor([3, 1]), torch.device("cpu")), recon[[3, 1]])


class PlayedGpu:
    """A simulated GPU in main memory that accepts a number of matrices and later fails on request."""

    def __init__(self, monkeypatch, room):
        self.room, self.asked = room, []
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
        empty = torch.empty

        def allocate(*shape, device=None, **options):
            if device == GPU:
                self.asked.append(shape)
                if len(self.asked) > self.room:
                    raise torch.OutOfMemoryError("CUDA out of memory")
            return empty(*shape, **options)

        monkeypatch.setattr(torch, "empty", allocate)


@pytest.mark.parametrize(("room", "max_bytes", "place"), [(2, 1, "gpu"), (1, 1, "files"), (0, 1 << 20, "memory")])
def test_rows_live_on_the_gpu_if_it_takes_all_of_them(monkeypatch, room, max_bytes, place):
    gpu = PlayedGpu(monkeypatch, room)
    with store_of(device=GPU, max_bytes=max_bytes) as store:
        assert store.place == place
        x, recon = torch.randn(50, 8), torch.randn(50, 8)
        store.put(batch_of(x, recon))
        assert torch.equal(store.get(SITE, None, torch.tensor([7]), torch.device("cpu")), x[[7]])
    assert gpu.asked


def test_a_nearly_full_gpu_is_not_used_for_rows(monkeypatch):
    gpu = PlayedGpu(monkeypatch, room=2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 2 * 50 * 8 * 4, 1 << 40))
    assert store_of(device=GPU).place == "memory"
    assert gpu.asked == []


@pytest.mark.parametrize("method", ["put", "get"])
@pytest.mark.parametrize("max_bytes", [1, 1 << 20], ids=["files", "memory"])
def test_rows_move_from_a_full_gpu_to_the_host(monkeypatch, caplog, method, max_bytes):
    PlayedGpu(monkeypatch, room=2)
    x, recon = torch.randn(50, 8), torch.randn(50, 8)
    part = {"put": "_write_rows", "get": "_read_rows"}[method]
    work, failed = getattr(row_store.RowStore, part), []

    def refuse_once(self, *args):
        if self.place == "gpu" and (method == "get" or int(args[2][0]) == 30):
            failed.append(part)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(self, *args)

    monkeypatch.setattr(row_store.RowStore, part, refuse_once)
    with store_of(device=GPU, max_bytes=max_bytes) as store:
        for rows in (slice(0, 30), slice(30, 50)):
            batch = batch_of(x[rows], recon[rows])
            store.put(replace(batch, row_ids=torch.arange(50)[rows]))
        for sae_id, whole in ((None, x), (0, recon)):
            assert torch.equal(store.get(SITE, sae_id, torch.arange(50), torch.device("cpu")), whole)
        assert store.place == ("files" if max_bytes == 1 else "memory")
    assert failed == [part]
    assert caplog.text.count("out of memory") == 1


def test_lack_of_memory_after_the_rows_left_the_gpu_is_an_error(monkeypatch):
    def refuse(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    PlayedGpu(monkeypatch, room=2)
    monkeypatch.setattr(row_store.RowStore, "_read_rows", refuse)
    with store_of(device=GPU) as store, pytest.raises(torch.OutOfMemoryError):
        store.get(SITE, None, torch.arange(50), torch.device("cpu"))


def test_a_disk_too_small_for_the_rows_is_an_error_at_once(monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        store_of(max_bytes=1)


def test_spilling_changes_no_number(tiny_model, tiny_saes, tmp_path):
    data = write_csv(tmp_path / "women.csv", people(80))
    ask = Request(tiny_model, (tiny_saes,), data, tmp_path / "memory")
    before = set(Path(tempfile.gettempdir()).glob("delta-selectivity-*"))
    assert ask.run() == 0
    assert ask.into(tmp_path / "files").plus("--queue_gb", "0.000001").run() == 0
    assert numbers(tmp_path / "files") == numbers(tmp_path / "memory")
    assert set(Path(tempfile.gettempdir()).glob("delta-selectivity-*")) <= before
