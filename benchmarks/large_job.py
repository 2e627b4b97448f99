"""Run a job whose rows do not fit in memory: stored layer by layer, spilled to files, then probed layer by layer.

    found = large_job.run(n_rows=200_000, n_layers=12, width=768)
    found.peak_gb                  # the process's anonymous memory, without pages of files

Rows are synthetic: x, and a noisy copy of it as the reconstruction. They come in batches like those of the producer,
and use the program's own `RowStore` and `selectivity`, with one probe, five folds and one repeat.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from delta_selectivity.models.language_model import Site
from delta_selectivity.probing.folds import FoldPlan
from delta_selectivity.probing.probes import choose_backend
from delta_selectivity.probing.selectivity import fit_model, out_of_fold
from delta_selectivity.reporting import tables
from delta_selectivity.run.activations import NO_MENTION, LayerRows, SaeId
from delta_selectivity.run.row_store import RowStore

BATCH = 4096  # rows
MAX_BYTES = 2**30  # bytes of rows in memory; --queue_gb
SECOND = 0.05  # interval between two measurements of the memory


@dataclass(frozen=True)
class JobCost:
    """Time and memory of the job."""

    n_rows: int
    n_layers: int
    width: int
    stored_gb: float  # on disk
    store_seconds: float
    probe_seconds: float
    peak_gb: float  # anonymous memory


def run(n_rows: int, n_layers: int, width: int) -> JobCost:
    """Store all rows, then probe them."""
    labels, direction = _concept(n_rows, width)
    views: dict[tuple[Site, SaeId | None], int] = {}
    for layer in range(n_layers):
        views |= {(Site(layer, "resid_post"), view): width for view in (None, 0)}
    with _watching_memory() as peak, RowStore(views, n_rows, torch.device("cpu"), MAX_BYTES) as store:
        start = time.perf_counter()
        for layer in range(n_layers):
            for rows in _batches(Site(layer, "resid_post"), labels, direction):
                store.put(rows)
        stored = time.perf_counter()
        _probe(store, n_layers, labels)
        probed = time.perf_counter()
        gb = len(views) * n_rows * width * 4 / 1024**3
        place = store.place
    return JobCost(n_rows, n_layers, width, gb if place == "files" else 0.0, stored - start, probed - stored, max(peak))


def table(cost: JobCost, allowed_gb: float) -> list[tables.Row]:
    """Return the header and one row."""
    header = ("rows", "layers", "width", "files, GB", "store, s", "probes, s", "peak memory, GB", "allowed, GB")
    sizes = (f"{cost.n_rows:,}", str(cost.n_layers), str(cost.width), f"{cost.stored_gb:.1f}")
    seconds = (f"{cost.store_seconds:.0f}", f"{cost.probe_seconds:.0f}")
    return [header, (*sizes, *seconds, f"{cost.peak_gb:.2f}", f"{allowed_gb:g}")]


def _concept(n_rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Draw labels, bool [rows], and the unit direction along which they shift the rows, [width]."""
    random = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(width, generator=random), dim=0)
    return torch.rand(n_rows, generator=random) < 0.5, direction


def _batches(site: Site, labels: Tensor, direction: Tensor) -> Iterator[LayerRows]:
    random = torch.Generator().manual_seed(site.layer)
    whole = torch.tensor(NO_MENTION)
    for row_ids in torch.arange(len(labels)).split(BATCH):
        x = torch.randn(len(row_ids), len(direction), generator=random) + labels[row_ids, None] * direction
        recon = x + 0.3 * torch.randn(x.shape, generator=random)
        yield LayerRows(site, row_ids, x, {0: recon}, {None: whole, 0: whole})


def _probe(store: RowStore, n_layers: int, labels: Tensor) -> None:
    """Probe both views of every layer, with five folds of people who have two rows each."""
    device = torch.device("cpu")
    backend, _ = choose_backend("auto", device)
    groups = np.arange(len(labels)) // 2
    plan = FoldPlan.build(labels.numpy()[None], groups, weights=None, n_folds=5, n_repeats=1, seed=0)
    everything = torch.arange(len(labels))
    for layer in range(n_layers):
        site = Site(layer, "resid_post")
        model = fit_model(plan, store.get(site, None, everything, device), backend)
        out_of_fold(plan, model, store.get(site, 0, everything, device), backend)


@contextmanager
def _watching_memory() -> Iterator[list[float]]:
    """Measure the process's anonymous memory in GB repeatedly inside the context."""
    seen, done = [_anonymous_gb()], threading.Event()

    def watch() -> None:
        while not done.wait(SECOND):
            seen.append(_anonymous_gb())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def _anonymous_gb() -> float:
    """Return the anonymous memory in GB (Linux only)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (kb,) = (line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(kb) / 1024**2
