"""The consumer: stores rows and probes each dataset, layer by layer, once all its rows have arrived.

    prober = Prober(work, blocks, settings, ...)
    prober.run(queue)            # in the consumer thread of `pipeline`

The results of each layer are passed on as soon as they are measured.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from itertools import takewhile

import torch

from delta_selectivity.models.language_model import Site
from delta_selectivity.probing.probes import ProbeBackend, choose_backend
from delta_selectivity.probing.selectivity import FitModel, OutOfFold, as_record, measure
from delta_selectivity.records.result_file import Json
from delta_selectivity.run.activations import Block, BlockDone, Item, LayerRows, SaeId
from delta_selectivity.run.cell_result import CellResult, OnResult
from delta_selectivity.run.planning import Cell, by_site
from delta_selectivity.run.reconstruction import Reconstruction, ReconstructionSums
from delta_selectivity.run.row_store import NOT_FINITE, NonFiniteError, RowStore
from delta_selectivity.run.rows import RowTable
from delta_selectivity.run.task_set import TaskSet, task_sets
from delta_selectivity.run.token_sample import TokenSample
from delta_selectivity.saes import SparseRows
from delta_selectivity.settings import LATENT_VIEWS, Settings
from delta_selectivity.system.cores import Cores
from delta_selectivity.system.memory import return_free_memory
from delta_selectivity.system.stopwatch import Stopwatch
from delta_selectivity.tasks import Dataset, ProbeTexts

log = logging.getLogger(__name__)

TEXT_SHOWN = 60  # maximum length of a text in an error message


@dataclass(frozen=True)
class Work:
    """The cells to measure, with their probes and settings."""

    texts: ProbeTexts
    rows: RowTable
    widths: Mapping[Site, int]  # of the activations
    cells: Sequence[Cell]
    names: Sequence[str]  # of the subjects
    codes: Mapping[SaeId, SparseRows]  # features of each mention, of baselines without a reconstruction
    latents_of: Set[SaeId]  # subjects whose latents are a view
    settings: Settings
    device: torch.device  # of the probes
    fit_model: FitModel  # fits the model's view, or reads the fit of an earlier run
    sample: TokenSample  # of the tokens that count in whole-text figures

    @property
    def datasets(self) -> dict[int, dict[Site, list[SaeId]]]:
        """Dataset index -> sites in order of layers -> subjects."""
        return {
            index: by_site(cell for cell in self.cells if cell.dataset == index)
            for index in sorted({cell.dataset for cell in self.cells})
        }

    @property
    def n_probes(self) -> int:
        """The number of results to measure: (probe, layer, subject)."""
        return sum(len(self.texts.datasets[cell.dataset].probes) for cell in self.cells)

    def task_sets(self, index: int, keep_fits: bool = False) -> list[TaskSet]:
        """Return the task sets of a dataset."""
        return task_sets(self.texts, self.texts.datasets[index], self.rows, self.settings, self.codes, keep_fits)


class Prober:
    """The consumer, which stores rows until a dataset is complete, then fits its probes and passes on the results."""

    def __init__(
        self,
        work: Work,
        blocks: Sequence[Block],
        store_bytes: int,
        cores: Cores,  # each probes one layer; 1 on a GPU
        clock: Stopwatch,
        on_result: OnResult,
        on_probes: Callable[[int], None],
        stop: threading.Event,
        sets: Mapping[int, Sequence[TaskSet]] | None = None,  # by dataset; None: built when needed
    ) -> None:
        self.work, self.blocks, self.on_result = work, blocks, on_result
        self.store_bytes, self.cores, self.clock = store_bytes, cores, clock
        self.on_probes, self.stop, self.sets = on_probes, stop, sets
        self._datasets = work.datasets
        self._done: list[BlockDone] = []  # complete blocks with a dataset that is not probed yet
        self._pending = set(self._datasets)

    def run(self, queue: Iterable[Item]) -> None:
        """Process the queue to its end; return early, between two layers, once `stop` is set."""
        backend, reason = choose_backend(self.work.settings.probe, self.work.device)  # cuML's settings are per thread
        log.info("probes by %s: %s", backend.name, reason)
        views: set[tuple[Site, SaeId | None]] = {(cell.site, None) for cell in self.work.cells}
        views |= {(cell.site, cell.subject) for cell in self.work.cells if cell.subject not in self.work.codes}
        order = sorted(views, key=lambda view: (view[0], -1 if view[1] is None else view[1]))
        widths = {view: self.work.widths[view[0]] for view in order}
        with RowStore(widths, len(self.work.rows), self.work.device, self.store_bytes) as store:
            for item in queue:
                if isinstance(item, LayerRows):
                    self._store(item, store)
                    continue
                self._done.append(item)
                for index in sorted(item.block.datasets & self._datasets.keys()):
                    if self._is_complete(index):
                        self._probe_dataset(index, store, backend)
                        self._pending.discard(index)
                        return_free_memory()
                self._done = [done for done in self._done if done.block.datasets & self._pending]
                if self.stop.is_set():
                    return

    def abandon(self) -> None:
        """Drop all further results: the run has ended, and another run may already write its files."""
        self.on_result = _discard

    def _store(self, rows: LayerRows, store: RowStore) -> None:
        with self._locating_errors():
            store.put(rows)

    @contextmanager
    def _locating_errors(self) -> Iterator[None]:
        """Turn a `NonFiniteError` into an ArithmeticError that names text, layer and subject."""
        try:
            yield
        except NonFiniteError as error:
            raise ArithmeticError(describe_non_finite(error, self.work.texts, self.work.names)) from error

    def _is_complete(self, index: int) -> bool:
        done = [item.block for item in self._done]
        return all(any(b is block for b in done) for block in self.blocks if index in block.datasets)

    def _probe_dataset(self, index: int, store: RowStore, backend: ProbeBackend) -> None:
        dataset, sites = self.work.texts.datasets[index], self._datasets[index]
        sets = self.work.task_sets(index) if self.sets is None else self.sets[index]

        def probe(site: Site) -> dict[SaeId, CellResult]:
            found = {subject: self._empty_result(index, site, subject) for subject in sites[site]}
            for task_set in sets:
                with self.clock.stage("probes"), self._locating_errors():
                    by_subject = self._scores(task_set, site, sites[site], store, backend)
                with self.clock.stage("statistics"):
                    for subject, scores in by_subject.items():
                        _add(found[subject], task_set.names, scores, self.work.settings.epsilon)
            return found

        until_stopped = takewhile(lambda _: not self.stop.is_set(), sites)
        with closing(self.cores.map_in_order(until_stopped, probe, "probes")) as probed:
            for site, found in probed:
                for subject, result in found.items():
                    self.on_result(Cell(index, site, subject), _in_order(result, dataset))
                self.on_probes(len(dataset.probes) * len(found))

    def _scores(
        self, task_set: TaskSet, site: Site, subjects: Sequence[SaeId], store: RowStore, backend: ProbeBackend
    ) -> dict[SaeId, OutOfFold]:
        """Return scores by subject; the model's view and the control task are fitted once."""
        model = task_set.fit_model(site, store, backend, self.work.device, self.work.fit_model)
        requested = self.work.settings.views
        found = {}
        for subject in subjects:
            views = [view for view in requested if view not in LATENT_VIEWS or subject in self.work.latents_of]
            try:
                found[subject] = task_set.out_of_fold(site, subject, model, store, backend, views)
            except ArithmeticError as error:
                name = self.work.names[subject]
                raise ArithmeticError(f"layer {site.layer}: codes or reconstructions by {name}: {error}") from error
        return found

    def _empty_result(self, index: int, site: Site, subject: SaeId) -> CellResult:
        """Return a result with reconstruction figures and no probes yet."""
        return CellResult(self._figures(index, site, subject), {}, {})

    def _figures(self, index: int, site: Site, subject: SaeId) -> Reconstruction:
        if subject in self.work.codes:
            return ReconstructionSums.empty(d=0, d_sae=0, device="cpu").figures()  # it has no reconstruction
        limit = self.work.sample.limits[index]
        parts = (item.sums[site, subject].restricted_to(limit) for item in self._done if index in item.block.datasets)
        return reduce(ReconstructionSums.merge, parts).figures(limit)


def describe_non_finite(error: NonFiniteError, texts: ProbeTexts, names: Sequence[str]) -> str:
    """Return a message that names the text, layer and subject of a non-finite number."""
    text = texts.mentions[error.mention].text
    shown = text if len(text) <= TEXT_SHOWN else f"{text[:TEXT_SHOWN]}..."
    what = "the model's activations"
    if error.sae_id is not None:
        what = f"the codes or the reconstruction by {names[error.sae_id]}"
    return f"layer {error.site.layer}: {NOT_FINITE} in {what} of the text {shown!r}"


def _discard(_cell: Cell, _found: CellResult) -> None:
    pass


def _add(result: CellResult, names: Sequence[str], scores: OutOfFold, epsilon: float) -> None:
    """Add the probes of one task set."""
    result.records.update(zip(names, map(as_record, measure(scores, epsilon)), strict=True))
    result.scores.update({names[place]: scores.probe(t) for t, place in enumerate(scores.plan.kept)})


def _in_order(result: CellResult, dataset: Dataset) -> CellResult:
    """Return the result with the probes in the order of the dataset."""
    names = [probe.name for probe in dataset.probes]
    records: Json = {name: result.records[name] for name in names}
    return replace(result, records=records, scores={n: result.scores[n] for n in names if n in result.scores})
