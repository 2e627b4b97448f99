"""Probes of a dataset that share their rows, folds and fits."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from delta_selectivity.models.language_model import Site
from delta_selectivity.probing.folds import FoldPlan, control_plan
from delta_selectivity.probing.k_sparse import with_k_sparse
from delta_selectivity.probing.probes import ProbeBackend
from delta_selectivity.probing.selectivity import FitModel, ModelFit, OutOfFold, ViewFit, fit_sparse, out_of_fold
from delta_selectivity.run.activations import SaeId
from delta_selectivity.run.row_store import RowStore
from delta_selectivity.run.rows import RowTable
from delta_selectivity.saes import SparseRows
from delta_selectivity.settings import LATENT_VIEWS, Settings
from delta_selectivity.tasks import Dataset, Probe, ProbeTexts


@dataclass(frozen=True)
class TaskSet:
    """Probes on the same rows, with shared folds and fits."""

    names: tuple[str, ...]  # of the probes
    row_ids: Tensor  # int64 [rows]
    plan: FoldPlan
    control: FoldPlan | None  # of the control task; None: too few token types
    codes: Mapping[SaeId, SparseRows]  # [rows, features], of baselines without a reconstruction
    model_fits: dict[Site, ModelFit] | None = None  # reused when SAEs are measured one after another; None: not stored
    _code_fits: dict[SaeId, ViewFit] = field(default_factory=dict)  # the same in every layer
    _code_lock: threading.Lock = field(default_factory=threading.Lock)  # one layer fits them, the others wait for it

    def out_of_fold(
        self,
        site: Site,
        subject: SaeId,
        model: ModelFit,
        store: RowStore,
        backend: ProbeBackend,
        views: Sequence[str],  # the views to measure of this subject
    ) -> OutOfFold:
        """Return the scores of one subject and of the model view."""
        if subject in self.codes:
            return out_of_fold(self.plan, model, self._fit_codes(subject, backend, model.x.device), backend)
        recon = store.get(site, subject, self.row_ids, model.x.device)
        latents = None
        if not LATENT_VIEWS.isdisjoint(views):
            latents = store.get_latents(site, subject, self.row_ids, model.x.device)
        as_view = latents if "latents" in views else None
        found = out_of_fold(self.plan, model, recon, backend, "error" in views, as_view)
        return with_k_sparse(found, latents) if latents is not None and "ksparse" in views else found

    def fit_model(
        self, site: Site, store: RowStore, backend: ProbeBackend, device: torch.device, fit: FitModel
    ) -> ModelFit:
        """Fit the model view and the control task at a site, or return the stored fit."""
        if self.model_fits is not None and site in self.model_fits:
            return self.model_fits[site]
        found = fit(self.plan, store.get(site, None, self.row_ids, device), backend, self.control)
        if self.model_fits is not None:
            self.model_fits[site] = found
        return found

    def _fit_codes(self, subject: SaeId, backend: ProbeBackend, device: torch.device) -> ViewFit:
        with self._code_lock:
            if subject not in self._code_fits:
                codes = self.codes[subject].to_csr().to(device)
                self._code_fits[subject] = fit_sparse(self.plan, codes, backend)
            return self._code_fits[subject]


def task_sets(
    texts: ProbeTexts,
    dataset: Dataset,
    rows: RowTable,
    settings: Settings,
    codes: Mapping[SaeId, SparseRows],
    keep_fits: bool = False,
) -> list[TaskSet]:
    """Return the task sets of a dataset; keep_fits: its fits of the model view stay in memory."""
    groups: dict[bytes, list[Probe]] = {}
    for probe in dataset.probes:
        groups.setdefault(probe.mentions.tobytes(), []).append(probe)
    return [_task_set(texts, probes, rows, settings, codes, keep_fits) for probes in groups.values()]


def _task_set(
    texts: ProbeTexts,
    probes: Sequence[Probe],
    rows: RowTable,
    settings: Settings,
    codes: Mapping[SaeId, SparseRows],
    keep_fits: bool,
) -> TaskSet:
    mentions = probes[0].mentions
    row_ids = rows.ids_of(mentions)
    weights = rows.weight[row_ids]
    plan = FoldPlan.build(
        labels=np.stack([np.repeat(probe.labels, rows.count(mentions)) for probe in probes]),
        groups=texts.persons[rows.mention[row_ids]],
        weights=weights,
        n_folds=settings.folds,
        n_repeats=settings.repeats,
        seed=settings.seed,
    )
    order = text_ranks(texts, rows, row_ids)
    control = control_plan(rows.token[row_ids], order, weights, settings.folds, settings.seed)
    of_row = torch.from_numpy(rows.mention[row_ids])
    own_codes = {subject: seen.select(of_row) for subject, seen in codes.items()}
    names = tuple(probe.name for probe in probes)
    return TaskSet(names, torch.from_numpy(row_ids), plan, control, own_codes, {} if keep_fits else None)


def text_ranks(texts: ProbeTexts, rows: RowTable, row_ids: np.ndarray) -> np.ndarray:
    """Return the rank of each row by text and span, int64 [rows], independent of the order of the texts."""
    mentions = [texts.mentions[m] for m in rows.mention[row_ids]]
    names = [(m.text, m.start, m.end, int(row)) for m, row in zip(mentions, row_ids, strict=True)]
    rank = np.empty(len(names), dtype=np.int64)
    rank[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
    return rank
