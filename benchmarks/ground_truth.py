"""Does delta_sel move with the truth? SAEs from perfect to broken in a world whose features are known.

python benchmarks/ground_truth.py run            # build the world, train, measure (minutes)
python benchmarks/ground_truth.py run --seed 1   # another world, other SAEs
python benchmarks/ground_truth.py                # the tables, from what `run` kept

Tasks are the presence of a feature in a row; a row is one mention of a person of its own. See docs/ground_truth.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import records  # noqa: E402 - the project is not installed as a package
import report  # noqa: E402
from benchmarks.synthetic_features import recovery  # noqa: E402
from benchmarks.synthetic_features.candidates import Candidate, all_candidates  # noqa: E402
from benchmarks.synthetic_features.world import Rows, World, WorldSettings, tasks  # noqa: E402
from probe_statistics import correct  # noqa: E402
from probes import ProbeBackend, choose_backend  # noqa: E402
from reconstruction import ReconstructionSums  # noqa: E402
from sae_formats.selection import nonzero_codes  # noqa: E402
from selectivity import FoldPlan, ModelFit, OutOfFold, fit_model, out_of_fold  # noqa: E402
from uncertainty import Cell, Estimate, balanced_mean, estimate_mean  # noqa: E402

log = logging.getLogger(__name__)

KEPT = Path(__file__).resolve().with_suffix("")  # folder beside this file
N_TRAIN, N_ROWS, N_TASKS = 2**16, 3000, 16
N_FOLDS, N_REPEATS = 5, 3
PREDICTORS = ("delta_sel", "transfer_delta", "mse", "fvu", "l0")
TRUTHS = ("held", "held_tasks", "matched", "mcc")


@dataclass(frozen=True)
class Result:
    """One SAE: what it truly keeps, and what each score says of it."""

    name: str
    deceives: bool  # built so that delta_sel and recovery must disagree; left out of the rank correlations
    held: float  # as in `recovery.Recovery`, with the next three
    held_tasks: float
    matched: float
    mcc: float
    delta_sel: float  # mean over tasks
    ci_low: float
    ci_high: float
    transfer_delta: float  # mean over tasks
    latent_sel: float | None  # mean over tasks, of probes on the codes; where asked for
    mse: float
    fvu: float
    l0: float


@dataclass(frozen=True)
class Bench:
    """Rows to measure on, their tasks, and the probes of the model's view, shared by all SAEs."""

    world: World
    rows: Rows
    features: Tensor  # int64 [tasks], whose presence is probed for
    plan: FoldPlan
    model: ModelFit
    backend: ProbeBackend

    @classmethod
    def build(cls, world: World, rows: Rows, n_tasks: int, seed: int) -> Bench:
        """Probes for `n_tasks` features on the rows of a world."""
        features = tasks(rows, n_tasks)
        labels = (rows.activations[:, features] > 0).numpy().T
        plan = FoldPlan.build(labels, np.arange(len(rows)), None, N_FOLDS, N_REPEATS, seed)
        backend, _ = choose_backend("torch", "cpu")
        return cls(world, rows, features, plan, fit_model(plan, rows.x, backend), backend)

    def measure(self, candidate: Candidate, latents_view: bool = False) -> Result:
        """Everything about one SAE."""
        codes = candidate.codes(self.rows)
        recon = candidate.reconstruct(codes)
        sparse = codes.to_sparse_csr() if latents_view else None
        found = out_of_fold(self.plan, self.model, recon, self.backend, latents=sparse)
        delta = mean_change(found, "sae")
        sums = ReconstructionSums(recon.shape[1], codes.shape[1], "cpu")
        sums.add_probed(self.rows.x, recon, nonzero_codes(codes))
        figures = sums.figures()
        assert figures.mse_pos is not None and figures.fvu_pos is not None and figures.l0 is not None
        true = recovery.measure(self.rows, recon, codes, candidate.atoms, self.world.directions, self.features)
        return Result(
            name=candidate.name,
            deceives=candidate.deceives,
            **asdict(true),
            delta_sel=delta.value,
            ci_low=delta.low,
            ci_high=delta.high,
            transfer_delta=mean_change(found, "transfer").value,
            latent_sel=mean_sel(found, "latents") if latents_view else None,
            mse=figures.mse_pos,
            fvu=figures.fvu_pos,
            l0=figures.l0,
        )


def mean_change(found: OutOfFold, view: str) -> Estimate:
    """The view's balanced accuracy minus the model's, averaged over tasks; a person's rows in all of them are one draw."""
    probes = [found.probe(t) for t in range(len(found.plan.labels))]
    return estimate_mean([Cell(correct(p, view) - correct(p, "model"), p.labels, p.persons) for p in probes])


def mean_sel(found: OutOfFold, view: str) -> float:
    """The view's balanced accuracy, averaged over tasks."""
    probes = [found.probe(t) for t in range(len(found.plan.labels))]
    return float(np.mean([balanced_mean(correct(p, view), p.labels) for p in probes]))


def run(seed: int) -> None:
    """Measure every SAE, and keep the figures."""
    torch.set_num_threads(1)
    world = World.build(WorldSettings(seed=seed))
    bench = Bench.build(world, world.sample(N_ROWS, seed=seed + 1), N_TASKS, seed)
    candidates = all_candidates(world, world.sample(N_TRAIN, seed=seed + 2).x, bench.features, seed)
    results = []
    for candidate in candidates:
        results.append(bench.measure(candidate, latents_view=True))
        log.info("%s: held %.3f, delta_sel %+.3f", candidate.name, results[-1].held, results[-1].delta_sel)
    config = {"world": asdict(world.settings), "rows": N_ROWS, "tasks": N_TASKS, "folds": N_FOLDS, "repeats": N_REPEATS}
    KEPT.mkdir(exist_ok=True)
    content = {"saes": [asdict(result) for result in results], "_run": records.describe_run(config)}
    records.write_json(kept_file(seed), content)


def kept_file(seed: int) -> Path:
    return KEPT / f"seed_{seed}.json"
