"""The stages of `benchmarks/reliability.py`. Each keeps its results in a folder and skips what is already there."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import bundled
from benchmarks.paired_scores import Errors
from benchmarks.probe_draws import Pool, Task
from benchmarks.sae_families import CorpusActivations, Study, as_sae, corpus_activations, harvested, train
from benchmarks.sae_panel import Snapshot
from delta_selectivity.errors import RequestError
from delta_selectivity.probing.k_sparse import k_sparse_fit
from delta_selectivity.probing.probe_statistics import ProbeScores, quantised
from delta_selectivity.probing.probes import ProbeBackend, choose_backend
from delta_selectivity.probing.selectivity import ModelFit, fit_model, out_of_fold, transfer_scores
from delta_selectivity.records import scores
from delta_selectivity.saes import Sae
from scripts.sae_training.harvest import Activations

log = logging.getLogger(__name__)

KS = (1, 5, 16)  # of the k-sparse probes that are compared


@dataclass(frozen=True)
class Work:
    """The folder, and the inputs of the first stages."""

    folder: Path
    study: Study
    corpus: Path | None  # text, or a folder of `scripts/train_saes.py harvest`; None: activations already exist
    transfer_only: bool = False  # whether to leave out all views that have probes of their own

    def corpus_activations(self) -> CorpusActivations:
        """Return the activations on which SAEs are trained.

        Raises `RequestError` if there are none and there is no corpus.
        """
        if self.corpus is not None and (self.corpus / "harvest.json").is_file():
            return harvested(Activations.open(self.corpus), self.study.layer)
        path = self.folder / "corpus.safetensors"
        if not path.exists():
            if self.corpus is None or not self.corpus.is_file():
                raise RequestError(f"--corpus {self.corpus}: no such file: give text to train SAEs on")
            log.info("activations of %s", self.corpus)
            acts = corpus_activations(self.study, self.corpus, seed=0)
            _save(path, {"train": acts.train, "held_out": acts.held_out, "held_out_text": acts.held_out_text})
        return CorpusActivations(**load_file(path))

    def probed_activations(self, pool: Pool) -> Tensor:
        """Return float32 [mentions, d] at the probed positions."""
        path = self.folder / ("probed.safetensors" if self.study.runs else f"probed_{self.study.rows}.safetensors")
        if not path.exists():
            log.info("activations of %d mentions", len(pool.texts.mentions))
            layer, study = self.study.layer, self.study
            _save(path, {"x": bundled.activations(pool.texts.mentions, [layer], study.model, study.dtype)[layer]})
        return load_file(path)["x"]

    def train(self, panel: Sequence[Snapshot], acts: Tensor) -> None:
        """Train the missing SAEs of the panel on acts [tokens, d]."""
        recipes = {snapshot.recipe.name: snapshot.recipe for snapshot in panel}
        for recipe in recipes.values():
            if not self._sae(Snapshot.trained(recipe)).exists():  # the last file that a training writes
                for step, weights in train(recipe, acts):
                    _save(self._sae(Snapshot(recipe, step)), weights)

    def sae(self, snapshot: Snapshot) -> Sae:
        return as_sae(snapshot.recipe, load_file(self._sae(snapshot)))

    def probe(self, draw: str, tasks: Sequence[Task], saes: Sequence[Snapshot], x: Tensor) -> None:
        """Compute out-of-fold scores of the SAEs on a draw of the rows x [mentions, d]; fit the model's probes once."""
        missing = [snapshot for snapshot in saes if not self._scores(draw, snapshot).exists()]
        if not missing:
            return
        log.info("%s: %d SAEs to probe", draw, len(missing))
        backend, _ = choose_backend("torch", "cpu")
        fits = [fit_model(task.plan, x[torch.from_numpy(task.rows)], backend) for task in tasks]
        for snapshot in missing:
            sae, found = self.sae(snapshot), dict[str, ProbeScores]()
            for task, fit in zip(tasks, fits, strict=True):
                found |= transfer(task, fit, sae) if self.transfer_only else probe_scores(task, fit, sae, backend)
            path = self._scores(draw, snapshot)
            path.parent.parent.mkdir(parents=True, exist_ok=True)
            scores.save(path, scores.LayerScores(self.study.layer, draw, found))

    def scores(self, draw: str, snapshot: Snapshot) -> list[ProbeScores]:
        """Return the results of `probe`, by probe."""
        needed = ("model", "transfer") if self.transfer_only else ("model", "sae", "transfer")
        return list(scores.load(self._scores(draw, snapshot), needed).probes.values())

    def _sae(self, snapshot: Snapshot) -> Path:
        return self.folder / "saes" / f"{snapshot.name}.safetensors"

    def _scores(self, draw: str, snapshot: Snapshot) -> Path:
        views = "transfer" if self.transfer_only else "scores"
        return self.folder / views / draw / f"{snapshot.name}.safetensors"


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
    unfinished.replace(path)


def transfer(task: Task, fit: ModelFit, sae: Sae) -> dict[str, ProbeScores]:
    """Return each probe's scores of the views model and transfer, which need no further fit."""
    on_recon = quantised(transfer_scores(task.plan, fit.fit, sae.decode(sae.encode(fit.x))).cpu().numpy())
    on_x, outliers = quantised(fit.fit.scores.cpu().numpy()), fit.outliers if fit.outliers.any() else None
    plan = task.plan
    return {
        task.names[place]: ProbeScores(
            {"model": on_x[t], "transfer": on_recon[t]}, plan.labels[t], plan.groups, plan.weights, plan.folds, outliers
        )
        for t, place in enumerate(plan.kept)
    }


def probe_scores(task: Task, fit: ModelFit, sae: Sae, backend: ProbeBackend) -> dict[str, ProbeScores]:
    """Return each probe's scores of the views model, sae and transfer, and of the k-sparse probes `k1`, `k5`, ..."""
    codes = sae.encode(fit.x)
    found = out_of_fold(task.plan, fit, sae.decode(codes), backend)
    sparse = quantised(k_sparse_fit(task.plan, codes.to_csr(), KS).scores)  # [ks, targets, repeats, rows]
    result = {}
    for t, place in enumerate(task.plan.kept):
        probe = found.probe(t)
        views = {**probe.views, **{f"k{k}": sparse[i, t] for i, k in enumerate(KS)}}
        result[task.names[place]] = replace(probe, views=views)
    return result


def errors_at(x: Tensor, sae: Sae, clusters: NDArray[np.int64]) -> Errors:
    """Return the error of the SAE on each row of x [rows, d]; clusters [rows]."""
    x = x.float()
    error = (x - sae.decode(sae.encode(x))).double().square().sum(1)
    deviation = (x.double() - x.double().mean(0)).square().sum(1)
    return Errors(error.numpy(), deviation.numpy(), clusters)
