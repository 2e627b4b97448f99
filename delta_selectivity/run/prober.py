"""The consumer: stores rows, and probes a dataset layer by layer as soon as the last of its rows is there.

    prober = Prober(work, blocks, settings, ...)
    prober.run(queue)            # in the thread that `pipeline` gives it

Every layer is written when it is measured: its scores first, then the result file that counts it as done.
"""

from __future__ import annotations

import logging
import resource
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import takewhile

import numpy as np
import torch

from delta_selectivity.models.language_model import Site
from delta_selectivity.probing.folds import FoldPlan, control_plan
from delta_selectivity.probing.probe_statistics import ProbeScores
from delta_selectivity.probing.probes import ProbeBackend, choose_backend
from delta_selectivity.probing.selectivity import (
    FitModel,
    OutOfFold,
    ViewFit,
    as_record,
    fit_sparse,
    measure,
    out_of_fold,
)
from delta_selectivity.records.result_file import Json, RecordFile
from delta_selectivity.records.sae_level import with_q_values
from delta_selectivity.records.scores import LayerScores, key_digest, path_of, prune, save
from delta_selectivity.run.activations import Block, BlockDone, Item, LayerRows, RowTable, SaeId
from delta_selectivity.run.bounded_queue import BoundedQueue
from delta_selectivity.run.reconstruction import Reconstruction, ReconstructionSums
from delta_selectivity.run.row_store import NonFiniteError, RowStore
from delta_selectivity.saes import SparseRows
from delta_selectivity.system.cores import Cores
from delta_selectivity.system.stopwatch import Stopwatch
from delta_selectivity.tasks import Dataset, Probe, ProbeTexts

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
    epsilon: float  # differences of selectivity within +-this count as preserved
    device: torch.device
    fit_model: FitModel  # fits the model's own view, or has its fit from an earlier run


@dataclass(frozen=True)
class Work:
    """What is still to be measured."""

    texts: ProbeTexts
    rows: RowTable
    widths: Mapping[Site, int]  # of the activations
    files: Mapping[tuple[SaeId, int], RecordFile]  # (SAE, dataset index) -> its file
    missing: Mapping[int, Mapping[Site, Sequence[SaeId]]]  # dataset index -> sites in order of layers -> SAEs
    sae_names: Sequence[str]
    codes: Mapping[SaeId, SparseRows]  # of baselines that reconstruct nothing: what a probe sees of each mention
    latents_of: Set[SaeId]  # whose latents are a view

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
        cores: Cores,  # one layer on each; one on a GPU
        clock: Stopwatch,
        on_probes: Callable[[int], None],
        stop: threading.Event,
    ) -> None:
        self.work, self.blocks, self.settings, self.probe = work, blocks, settings, probe
        self.store_bytes, self.cores, self.clock = store_bytes, cores, clock
        self.on_probes, self.stop = on_probes, stop
        self._done: list[BlockDone] = []

    def run(self, queue: BoundedQueue[Item]) -> None:
        """Take everything from the queue; returns early, between two layers, once `stop` is set."""
        backend, reason = choose_backend(self.probe, self.settings.device)  # here: cuML's settings belong to a thread
        log.info("probes by %s: %s", backend.name, reason)
        sites = {site: saes for dataset in self.work.missing.values() for site, saes in dataset.items()}
        views: set[tuple[Site, SaeId | None]] = {(site, None) for site in sites}
        views |= {(s, sae) for dataset in self.work.missing.values() for s, saes in dataset.items() for sae in saes}
        kept = (view for view in views if view[1] not in self.work.codes)
        order = sorted(kept, key=lambda view: (view[0], -1 if view[1] is None else view[1]))
        widths = {view: self.work.widths[view[0]] for view in order}
        with RowStore(widths, len(self.work.rows), self.settings.device, self.store_bytes) as store:
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

        def probe(site: Site) -> dict[SaeId, _Found]:
            found = {sae_id: _Found({}, {}) for sae_id in missing[site]}
            for task_set in task_sets:
                with self.clock.stage("probes"):
                    by_sae = task_set.out_of_fold(
                        site, missing[site], self.work.latents_of, store, backend, self.settings
                    )
                with self.clock.stage("statistics"):
                    for sae_id, scores in by_sae.items():
                        found[sae_id].add(task_set.names, scores, self.settings.epsilon)
            return found

        until_stopped = takewhile(lambda _: not self.stop.is_set(), missing)
        with closing(self.cores.in_order(until_stopped, probe, "probes")) as probed:
            for site, found in probed:
                for sae_id, of_sae in found.items():
                    self._write(index, site, sae_id, of_sae.in_order(dataset))
                self.on_probes(len(dataset.probes) * len(found))

    def _task_set(self, probes: Sequence[Probe]) -> _TaskSet:
        mentions = probes[0].mentions
        row_ids = self.work.rows.of(mentions)
        of_row = self.work.rows.mention[row_ids]
        place = np.zeros(len(self.work.texts.mentions), dtype=np.int64)
        place[mentions] = np.arange(len(mentions))
        weights, asked = self.work.rows.weight[row_ids], self.settings
        plan = FoldPlan.build(
            labels=np.stack([probe.labels[place[of_row]] for probe in probes]),
            groups=self.work.texts.persons[of_row],
            weights=weights,
            n_folds=asked.folds,
            n_repeats=asked.repeats,
            seed=asked.seed,
        )
        tokens, names = self.work.rows.token[row_ids], self._in_order_of_text(row_ids)
        control = control_plan(tokens, names, weights, asked.folds, asked.seed)
        seen = {sae_id: codes.select(torch.from_numpy(of_row)) for sae_id, codes in self.work.codes.items()}
        return _TaskSet([probe.name for probe in probes], torch.from_numpy(row_ids), plan, control, seen)

    def _in_order_of_text(self, row_ids: np.ndarray) -> np.ndarray:
        """A number for each row, int64 [rows], that does not depend on the order in which its texts were given."""
        mentions = [self.work.texts.mentions[m] for m in self.work.rows.mention[row_ids]]
        names = [(m.text, m.start, m.end, int(row)) for m, row in zip(mentions, row_ids, strict=True)]
        rank = np.empty(len(names), dtype=np.int64)
        rank[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
        return rank

    def _write(self, index: int, site: Site, sae_id: SaeId, found: _Found) -> None:
        file = self.work.files[sae_id, index]
        figures = self._figures(index, site, sae_id)
        _warn(file, f"layer {site.layer}", figures, found.records, self.settings.repeats)
        layers = {**file.layers, site.layer: {**asdict(figures), **found.records}}
        family = {i: other.layers for (sae, i), other in self.work.files.items() if sae == sae_id and other.layers}
        with self.clock.stage("write"):
            prune(file.path, layers)
            save(path_of(file.path, site.layer), LayerScores(site.layer, key_digest(file.key), found.scores))
            file.q_family = sorted(self.work.files[sae_id, i].path.name for i in family.keys() | {index})
            file.seconds, file.resources, file.complete = self.clock.seconds(), peak_memory(), False
            file.write(with_q_values({**family, index: layers})[index])

    def _figures(self, index: int, site: Site, sae_id: SaeId) -> Reconstruction:
        if sae_id in self.work.codes:
            return ReconstructionSums.empty(d=0, d_sae=0, device="cpu").figures()  # of no rows
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
    control: FoldPlan | None  # of the control task; None: too few token types
    codes: Mapping[SaeId, SparseRows]  # [rows, any], of baselines that reconstruct nothing
    _fits: dict[SaeId, ViewFit] = field(default_factory=dict)  # of these: the same in every layer
    _fitting: threading.Lock = field(default_factory=threading.Lock)  # one layer fits them, the others wait for it

    def out_of_fold(
        self,
        site: Site,
        sae_ids: Sequence[SaeId],
        latents_of: Set[SaeId],
        store: RowStore,
        backend: ProbeBackend,
        settings: ProbeSettings,
    ) -> dict[SaeId, OutOfFold]:
        """Scores by SAE; the model's view and the control task are fitted once."""
        x = store.get(site, None, self.row_ids, settings.device)
        model = settings.fit_model(self.plan, x, backend, self.control)
        found = {}
        for sae_id in sae_ids:
            if sae_id in self.codes:
                found[sae_id] = out_of_fold(self.plan, model, self._fit_codes(sae_id, backend, settings), backend)
                continue
            recon = store.get(site, sae_id, self.row_ids, settings.device)
            latents = None
            if sae_id in latents_of:
                latents = store.get_latents(site, sae_id, self.row_ids, settings.device)
            found[sae_id] = out_of_fold(self.plan, model, recon, backend, "error" in settings.views, latents)
        return found

    def _fit_codes(self, sae_id: SaeId, backend: ProbeBackend, settings: ProbeSettings) -> ViewFit:
        with self._fitting:
            if sae_id not in self._fits:
                self._fits[sae_id] = fit_sparse(self.plan, self.codes[sae_id].to_csr().to(settings.device), backend)
            return self._fits[sae_id]


@dataclass(frozen=True)
class _Found:
    """What was measured of one SAE in one layer of a dataset."""

    records: Json  # probe -> its record
    scores: dict[str, ProbeScores]  # probe -> its out-of-fold scores, where there was something to measure

    def add(self, names: Sequence[str], found: OutOfFold, epsilon: float) -> None:
        """The probes of one task set."""
        self.records.update(zip(names, map(as_record, measure(found, epsilon)), strict=True))
        self.scores.update({names[place]: found.probe(t) for t, place in enumerate(found.plan.kept)})

    def in_order(self, dataset: Dataset) -> _Found:
        """The same in the order of the dataset's probes."""
        names = [probe.name for probe in dataset.probes]
        kept = {name: self.scores[name] for name in names if name in self.scores}
        return _Found({name: self.records[name] for name in names}, kept)


def _share_rows(dataset: Dataset) -> list[list[Probe]]:
    """The dataset's probes, those with the same mentions together."""
    groups: dict[bytes, list[Probe]] = {}
    for probe in dataset.probes:
        groups.setdefault(probe.mentions.tobytes(), []).append(probe)
    return list(groups.values())


def _warn(file: RecordFile, where: str, figures: Reconstruction, probes: Json, repeats: int) -> None:
    """Tell, once, what a reader of these numbers must know."""
    found = ["one partition (repeats 1): the intervals leave out the luck of the folds"] if repeats == 1 else []
    if not file.is_baseline and figures.fvu_pos is not None and figures.fvu_pos > 1:
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
            level = logging.INFO if file.is_baseline else logging.WARNING  # its SAE has told already, or will
            log.log(level, "%s: %s", file.path.name, line)


def peak_memory() -> dict[str, float]:
    """Peak resident memory of the process and of each CUDA device in use, GB."""
    peak = {"peak_ram_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, 3)}
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            peak[f"peak_cuda{device}_gb"] = round(torch.cuda.max_memory_allocated(device) / 1024**3, 3)
    return peak
