"""The two threads and their supervision.

The producer (device1) puts rows of activations on a bounded queue; the consumer (device2) stores them, and as soon
as the last block of a dataset is through it probes that dataset layer by layer, while the producer runs the texts
of the next one. A thread's error ends the run with its own traceback, whichever thread it was.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from activations import Block, BlockDone, Item, LayerRows, Producer, RowTable, SaeId
from bounded_queue import BoundedQueue, ProducerFailed, QueueCancelled
from datasets_wikidata import Dataset, Probe, ProbeTexts
from language_model import Site
from probes import ProbeBackend, choose_backend
from progress import Stopwatch
from reconstruction import Reconstruction, ReconstructionSums
from records import Json, RecordFile
from row_store import NonFiniteError, RowStore
from selectivity import FoldPlan, measure_site
from uncertainty import benjamini_hochberg

log = logging.getLogger(__name__)

TEXT_SHOWN = 60  # characters of a text in an error
FEW_PEOPLE = 100  # below this, intervals by the normal approximation are not to be trusted


@dataclass(frozen=True)
class ProbeSettings:
    """How every probe of the run is fitted."""

    folds: int
    repeats: int
    seed: int
    views: tuple[str, ...]
    device: torch.device


@dataclass(frozen=True)
class Work:
    """What is still to be measured."""

    texts: ProbeTexts
    rows: RowTable
    d_in: int
    files: Mapping[tuple[SaeId, int], RecordFile]  # (SAE, dataset index) -> its file
    missing: Mapping[int, Mapping[Site, Sequence[SaeId]]]  # dataset index -> sites in order of layers -> SAEs
    sae_names: Sequence[str]

    @property
    def n_probes(self) -> int:
        """Results to come: (probe, layer, SAE)."""
        return sum(
            len(self.texts.datasets[index].probes) * sum(map(len, sites.values()))
            for index, sites in self.missing.items()
        )


class Prober:
    """The consumer: keeps rows until a dataset is whole, then fits its probes and writes its files."""

    def __init__(
        self,
        work: Work,
        blocks: Sequence[Block],
        settings: ProbeSettings,
        probe: str,  # auto, torch, cuml or sklearn
        store_bytes: int,
        clock: Stopwatch,
        on_probes: Callable[[int], None],
        stop: threading.Event,
    ) -> None:
        self.work, self.blocks, self.settings, self.probe = work, blocks, settings, probe
        self.store_bytes, self.clock, self.on_probes, self.stop = store_bytes, clock, on_probes, stop
        self._done: list[BlockDone] = []

    def run(self, queue: BoundedQueue[Item]) -> None:
        """Take everything from the queue; returns early, between two layers, once `stop` is set."""
        backend, reason = choose_backend(self.probe, self.settings.device)  # here: cuML's settings belong to a thread
        log.info("probes by %s: %s", backend.name, reason)
        sites = {site: saes for dataset in self.work.missing.values() for site, saes in dataset.items()}
        views: set[tuple[Site, SaeId | None]] = {(site, None) for site in sites}
        views |= {(s, sae) for dataset in self.work.missing.values() for s, saes in dataset.items() for sae in saes}
        order = sorted(views, key=lambda view: (view[0], -1 if view[1] is None else view[1]))
        with RowStore(order, len(self.work.rows), self.work.d_in, self.settings.device, self.store_bytes) as store:
            for item in queue:
                if isinstance(item, LayerRows):
                    self._keep(item, store)
                    continue
                self._done.append(item)
                for index in sorted(item.block.datasets & self.work.missing.keys()):
                    if self._is_whole(index):
                        self._probe_dataset(index, store, backend)
                if self.stop.is_set():
                    return

    def _keep(self, rows: LayerRows, store: RowStore) -> None:
        try:
            store.put(rows)
        except NonFiniteError as error:
            text = self.work.texts.mentions[error.mention].text
            shown = text if len(text) <= TEXT_SHOWN else f"{text[:TEXT_SHOWN]}..."
            what = "the model's activations"
            if error.sae_id is not None:
                what = f"the codes or the reconstruction by {self.work.sae_names[error.sae_id]}"
            raise ArithmeticError(f"layer {error.site.layer}: NaN or Inf in {what} of the text {shown!r}") from error

    def _is_whole(self, index: int) -> bool:
        done = [item.block for item in self._done]
        return all(any(b is block for b in done) for block in self.blocks if index in block.datasets)

    def _probe_dataset(self, index: int, store: RowStore, backend: ProbeBackend) -> None:
        dataset, missing = self.work.texts.datasets[index], self.work.missing[index]
        task_sets = [self._task_set(probes) for probes in _share_rows(dataset)]
        for site, sae_ids in missing.items():
            if self.stop.is_set():
                return
            results: dict[SaeId, Json] = {sae_id: {} for sae_id in sae_ids}
            with self.clock.stage("probes"):
                for task_set in task_sets:
                    for sae_id, measured in task_set.measure(site, sae_ids, store, backend, self.settings).items():
                        results[sae_id].update(measured)
            for sae_id in sae_ids:
                in_order = {probe.name: results[sae_id][probe.name] for probe in dataset.probes}
                last = site == [there for there, asked in missing.items() if sae_id in asked][-1]
                self._write(index, site, sae_id, in_order, last)
            self.on_probes(len(dataset.probes) * len(sae_ids))

    def _task_set(self, probes: Sequence[Probe]) -> _TaskSet:
        mentions = probes[0].mentions
        row_ids = self.work.rows.of(mentions)
        of_row = self.work.rows.mention[row_ids]
        place = np.zeros(len(self.work.texts.mentions), dtype=np.int64)
        place[mentions] = np.arange(len(mentions))
        plan = FoldPlan.build(
            labels=np.stack([probe.labels[place[of_row]] for probe in probes]),
            groups=self.work.texts.persons[of_row],
            weights=self.work.rows.weight[row_ids],
            n_folds=self.settings.folds,
            n_repeats=self.settings.repeats,
            seed=self.settings.seed,
        )
        return _TaskSet([probe.name for probe in probes], torch.from_numpy(row_ids), plan)

    def _write(self, index: int, site: Site, sae_id: SaeId, probes: Json, last: bool) -> None:
        file = self.work.files[sae_id, index]
        figures = self._figures(index, site, sae_id)
        _warn(file, f"layer {site.layer}", figures, probes)
        layers = with_q_values({**file.layers, site.layer: {**asdict(figures), **probes}})
        with self.clock.stage("write"):
            file.write(layers, self.clock.seconds(), peak_memory(), complete=last)

    def _figures(self, index: int, site: Site, sae_id: SaeId) -> Reconstruction:
        parts = [item.sums[site, sae_id] for item in self._done if index in item.block.datasets]
        total: ReconstructionSums = parts[0]
        for part in parts[1:]:
            total = total.merge(part)
        return total.figures()


@dataclass(frozen=True)
class _TaskSet:
    """Probes of a dataset that share their rows, and so their folds and their fits."""

    names: list[str]
    row_ids: torch.Tensor  # int64 [rows]
    plan: FoldPlan

    def measure(
        self, site: Site, sae_ids: Sequence[SaeId], store: RowStore, backend: ProbeBackend, settings: ProbeSettings
    ) -> dict[SaeId, Json]:
        """Results by SAE and probe name."""
        x = store.get(site, None, self.row_ids, settings.device)
        recons = {sae_id: store.get(site, sae_id, self.row_ids, settings.device) for sae_id in sae_ids}
        measured = measure_site(self.plan, x, recons, backend, error_view="error" in settings.views)
        return {sae_id: dict(zip(self.names, results, strict=True)) for sae_id, results in measured.items()}


def _share_rows(dataset: Dataset) -> list[list[Probe]]:
    """The dataset's probes, those with the same mentions together."""
    groups: dict[bytes, list[Probe]] = {}
    for probe in dataset.probes:
        groups.setdefault(probe.mentions.tobytes(), []).append(probe)
    return list(groups.values())


def with_q_values(layers: Mapping[int, Json]) -> dict[int, Json]:
    """The layers with `q_value` set: Benjamini-Hochberg over all layers x probes of one file."""
    cells = [
        (layer, name)
        for layer in sorted(layers)
        for name, cell in layers[layer].items()
        if isinstance(cell, dict) and "p_value" in cell
    ]
    q_values = benjamini_hochberg([layers[layer][name]["p_value"] for layer, name in cells])
    result = {layer: dict(record) for layer, record in layers.items()}
    for (layer, name), q_value in zip(cells, q_values, strict=True):
        result[layer][name] = {**result[layer][name], "q_value": q_value}
    return result


def _warn(file: RecordFile, where: str, figures: Reconstruction, probes: Json) -> None:
    """Tell, once, what a reader of these numbers must know."""
    found = []
    if figures.fvu_pos is not None and figures.fvu_pos > 1:
        found.append(
            f"{where}: FVU {figures.fvu_pos:.2f} at the probed positions: the SAE reconstructs worse than the mean "
            "would; does it fit this model, layer and hook point?"
        )
    for name, result in probes.items():
        if result.get("reason"):
            found.append(f"{where} {name}: not measured: {result['reason']}")
            continue
        if not result["converged"]:
            found.append(f"{where} {name}: {result['n_unconverged']} probe fits did not converge")
        if result["n_people"] < FEW_PEOPLE:
            found.append(f"{where} {name}: only {result['n_people']} people: the interval is rough")
    for line in found:
        if line not in file.warnings:
            file.warnings.append(line)
            log.warning("%s: %s", file.path.name, line)


def peak_memory() -> dict[str, float]:
    """Peak resident memory of the process and of each CUDA device in use, GB."""
    peak = {"peak_ram_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, 3)}
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            peak[f"peak_cuda{device}_gb"] = round(torch.cuda.max_memory_allocated(device) / 1024**3, 3)
    return peak


@contextmanager
def sharing_cores(device1: str) -> Iterator[int]:
    """How many forward passes to run at a time: one on a GPU; on a CPU one a core, and torch uses one thread each.

    Two threads that both split their matrix products over the same cores wait for each other at every barrier: on 2
    cores a 0.3 s fit took up to 8 s beside a forward pass. Whole batches side by side have no barriers.
    """
    cores = torch.get_num_threads()
    if torch.device(device1).type != "cpu":
        yield 1
        return
    torch.set_num_threads(1)
    try:
        yield cores
    finally:
        torch.set_num_threads(cores)


def run(
    producer: Producer,
    prober: Prober,
    blocks: Sequence[Block],
    queue: BoundedQueue[Item],
    on_texts: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Run both threads to their end.

    Raises the error of whichever thread failed, or `KeyboardInterrupt` after Ctrl-C, SIGTERM or SIGHUP, once the layer
    in work is written. A second one ends the process at once; files are replaced whole, so none is harmed.
    """
    workers = [
        _Worker("producer", lambda: _produce(producer, blocks, queue, on_texts)),
        _Worker("consumer", lambda: _consume(prober, queue)),
    ]
    with _interruptible(stop, queue):
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(timeout=0.1)  # a join without end would keep signals waiting
    for worker in workers:
        if worker.error is not None:
            raise worker.error
    if stop.is_set():
        raise KeyboardInterrupt


@contextmanager
def _interruptible(stop: threading.Event, queue: BoundedQueue[Item]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP set `stop` while inside; a second one ends the process. In the main thread only."""

    def on_signal(_number: int, _frame: object) -> None:
        if stop.is_set():
            os._exit(130)
        log.warning("interrupted: finishing the layer in work; once more to stop now")
        stop.set()
        queue.cancel()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    watched = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in watched}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _produce(
    producer: Producer, blocks: Sequence[Block], queue: BoundedQueue[Item], on_texts: Callable[[int], None]
) -> None:
    try:
        producer.run(blocks, queue.put, on_texts)
        queue.close()
    except QueueCancelled:
        return  # the consumer failed or was stopped, and tells why itself
    except BaseException as error:
        queue.fail(error)
        raise


def _consume(prober: Prober, queue: BoundedQueue[Item]) -> None:
    try:
        prober.run(queue)
    except ProducerFailed:
        return  # the producer tells why itself
    finally:
        queue.cancel()


class _Worker(threading.Thread):
    """A thread that keeps its error, with its traceback, for the main thread."""

    def __init__(self, name: str, work: Callable[[], Any]) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error
