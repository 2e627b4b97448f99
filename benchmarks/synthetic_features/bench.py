"""Probes on the rows of a world, and all figures of one SAE."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from torch import Tensor

from benchmarks.synthetic_features import recovery
from benchmarks.synthetic_features.candidates import Candidate
from benchmarks.synthetic_features.recovery import Recovery
from benchmarks.synthetic_features.result import Result
from benchmarks.synthetic_features.world import Rows, World, tasks
from delta_selectivity.probing.folds import FoldPlan
from delta_selectivity.probing.probe_statistics import correct
from delta_selectivity.probing.probes import ProbeBackend, choose_backend
from delta_selectivity.probing.selectivity import ModelFit, OutOfFold, fit_model, out_of_fold
from delta_selectivity.probing.uncertainty import Cell, Estimate, balanced_mean, estimate_mean
from delta_selectivity.run.reconstruction import ReconstructionSums
from delta_selectivity.saes.selection import nonzero_codes

N_FOLDS, N_REPEATS = 5, 2


@dataclass(frozen=True)
class Bench:
    """Rows, tasks, and the probes of the model's view, which all SAEs share."""

    world: World
    truth: Rows  # other rows, on which the truth about an SAE is measured
    rows: Rows  # rows that are probed
    features: Tensor  # int64 [tasks], the features whose presence is probed
    plan: FoldPlan
    model: ModelFit
    backend: ProbeBackend

    @classmethod
    def build(cls, world: World, n_truth: int, n_rows: int, n_tasks: int, seed: int) -> Bench:
        """Draw the rows, and fit the model's probes for `n_tasks` features."""
        truth, rows = world.sample(n_truth, seed + 1), world.sample(n_rows, seed + 2)
        features = tasks(truth, n_tasks)
        labels = (rows.activations[:, features] > 0).numpy().T
        plan = FoldPlan.build(labels, np.arange(len(rows)), None, N_FOLDS, N_REPEATS, seed)
        backend, _ = choose_backend("torch", "cpu")
        return cls(world, truth, rows, features, plan, fit_model(plan, rows.x, backend), backend)

    def probe(self, candidate: Candidate, latents_view: bool = False) -> OutOfFold:
        """Probe one SAE's reconstruction, and its codes if requested."""
        codes = candidate.codes(self.rows)
        latents = codes.to_sparse_csr() if latents_view else None
        return out_of_fold(self.plan, self.model, candidate.reconstruct(codes), self.backend, latents=latents)

    def result(self, candidate: Candidate, found: OutOfFold) -> Result:
        """Return all figures of one SAE, from the results of its probes."""
        codes = candidate.codes(self.rows)
        recon = candidate.reconstruct(codes)
        delta = mean_change(found, "sae")
        sums = ReconstructionSums.empty(recon.shape[1], codes.shape[1], "cpu")
        sums.probed.add(self.rows.x, recon, nonzero_codes(codes))
        figures = sums.figures()
        assert figures.mse_pos is not None and figures.fvu_pos is not None and figures.l0 is not None
        return Result(
            name=candidate.name,
            deceives=candidate.deceives,
            **asdict(self.recovery(candidate)),
            delta_sel=delta.value,
            ci_low=delta.low,
            ci_high=delta.high,
            transfer_delta=mean_change(found, "transfer").value,
            latent_sel=mean_sel(found, "latents") if "latents" in found.views else None,
            mse=figures.mse_pos,
            fvu=figures.fvu_pos,
            l0=figures.l0,
        )

    def recovery(self, candidate: Candidate) -> Recovery:
        """Return what the SAE keeps of the features."""
        codes = candidate.codes(self.truth)
        recon = candidate.reconstruct(codes)
        return recovery.measure(self.truth, recon, codes, candidate.atoms, self.world.directions, self.features)


def mean_change(found: OutOfFold, view: str) -> Estimate:
    """Return the view's balanced accuracy minus the model's, averaged over tasks."""
    probes = [found.probe(t) for t in range(len(found.plan.labels))]
    return estimate_mean([Cell(correct(p, view) - correct(p, "model"), p.labels, p.persons) for p in probes])


def difference(a: OutOfFold, b: OutOfFold) -> Estimate:
    """Return sae_sel of a minus sae_sel of b, averaged over tasks and paired by row, fold and person."""
    pairs = [(a.probe(t), b.probe(t)) for t in range(len(a.plan.labels))]
    return estimate_mean([Cell(correct(p, "sae") - correct(q, "sae"), p.labels, p.persons) for p, q in pairs])


def mean_sel(found: OutOfFold, view: str) -> float:
    """Return the view's balanced accuracy, averaged over tasks."""
    probes = [found.probe(t) for t in range(len(found.plan.labels))]
    return float(np.mean([balanced_mean(correct(p, view), p.labels) for p in probes]))
