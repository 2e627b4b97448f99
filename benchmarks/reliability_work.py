"""The stages of `benchmarks/reliability.py`, each kept in a folder: what is there is not made again."""

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
from delta_selectivity.probing.selectivity import ModelFit, fit_model, out_of_fold
from delta_selectivity.records import scores
from delta_selectivity.saes import Sae
from scripts.sae_training.harvest import Activations

log = logging.getLogger(__name__)

KS = (1, 5, 16)  # of the k-sparse probes that are compared


@dataclass(frozen=True)
class Work:
    """The folder, and what the first stages need."""

    folder: Path
    study: Study
    corpus: Path | None  # text, or a folder that `scripts/train_saes.py harvest` made; None: activations are there

    def corpus_activations(self) -> CorpusActivations:
        """What SAEs are trained on. Raises `RequestError` if they are not there and there is no corpus."""
        if self.corpus is not None and (self.corpus / "harvest.json").is_file():
            return harvested(Activations.open(self.corpus), self.study.layer)
        path = self.folder / "corpus.safetensors"
        if not path.exists():
            if self.corpus is None or not self.corpus.is_file():
                raise RequestError(f"--corpus {self.corpus}: no such file; it is to be text to train SAEs on")
            log.info("activations of %s", self.corpus)
            acts = corpus_activations(self.study, self.corpus, seed=0)
            _save(path, {"train": acts.train, "held_out": acts.held_out, "held_out_text": acts.held_out_text})
        return CorpusActivations(**load_file(path))

    def probed_activations(self, pool: Pool) -> Tensor:
        """float32 [mentions, d] at the probed positions."""
        path = self.folder / ("probed.safetensors" if self.study.runs else f"probed_{self.study.rows}.safetensors")
        if not path.exists():
            log.info("activations of %d mentions", len(pool.texts.mentions))
            layer, study = self.study.layer, self.study
            _save(path, {"x": bundled.activations(pool.texts.mentions, [layer], study.model, study.dtype)[layer]})
        return load_file(path)["x"]

    def train(self, panel: Sequence[Snapshot], acts: Tensor) -> None:
        """Train what is missing of the panel on acts [tokens, d]."""
        recipes = {snapshot.recipe.name: snapshot.recipe for snapshot in panel}
        for recipe in recipes.values():
            if not self._sae(Snapshot.trained(recipe)).exists():  # the last that a training writes
                for step, weights in train(recipe, acts):
                    _save(self._sae(Snapshot(recipe, step)), weights)

    def sae(self, snapshot: Snapshot) -> Sae:
        return as_sae(snapshot.recipe, load_file(self._sae(snapshot)))

    def probe(self, draw: str, tasks: Sequence[Task], saes: Sequence[Snapshot], x: Tensor) -> None:
        """Out-of-fold scores of the SAEs on a draw of the rows x [mentions, d]; the model's probes are fitted once."""
        missing = [snapshot for snapshot in saes if not self._scores(draw, snapshot).exists()]
        if not missing:
            return
        log.info("%s: %d SAEs to probe", draw, len(missing))
        backend, _ = choose_backend("torch", "cpu")
        fits = [fit_model(task.plan, x[torch.from_numpy(task.rows)], backend) for task in tasks]
        for snapshot in missing:
            sae, found = self.sae(snapshot), dict[str, ProbeScores]()
            for task, fit in zip(tasks, fits, strict=True):
                found |= probe_scores(task, fit, sae, backend)
            path = self._scores(draw, snapshot)
            path.parent.parent.mkdir(parents=True, exist_ok=True)
            scores.save(path, scores.LayerScores(self.study.layer, draw, found))

    def scores(self, draw: str, snapshot: Snapshot) -> list[ProbeScores]:
        """What `probe` found, probe by probe."""
        return list(scores.load(self._scores(draw, snapshot)).probes.values())

    def _sae(self, snapshot: Snapshot) -> Path:
        return self.folder / "saes" / f"{snapshot.name}.safetensors"

    def _scores(self, draw: str, snapshot: Snapshot) -> Path:
        return self.folder / "scores" / draw / f"{snapshot.name}.safetensors"


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
    unfinished.replace(path)


def probe_scores(task: Task, fit: ModelFit, sae: Sae, backend: ProbeBackend) -> dict[str, ProbeScores]:
    """Each probe's scores of the views model, sae and transfer, and of `k1`, `k5` and so on: k-sparse probes."""
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
    """What the SAE leaves of each row of x [rows, d]; clusters [rows]."""
    x = x.float()
    error = (x - sae.decode(sae.encode(x))).double().square().sum(1)
    deviation = (x.double() - x.double().mean(0)).square().sum(1)
    return Errors(error.numpy(), deviation.numpy(), clusters)
