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
from collections.abc import Mapping, Sequence
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
from benchmarks.synthetic_features.candidates import SHUFFLED, Candidate, all_candidates  # noqa: E402
from benchmarks.synthetic_features.world import Rows, World, WorldSettings, tasks  # noqa: E402
from probe_statistics import correct  # noqa: E402
from probes import ProbeBackend, choose_backend  # noqa: E402
from reconstruction import ReconstructionSums  # noqa: E402
from sae_formats.selection import nonzero_codes  # noqa: E402
from selectivity import FoldPlan, ModelFit, OutOfFold, fit_model, out_of_fold  # noqa: E402
from uncertainty import Cell, Estimate, balanced_mean, estimate_mean  # noqa: E402

log = logging.getLogger(__name__)

KEPT = Path(__file__).resolve().with_suffix("")  # folder beside this file
N_TRAIN, N_ROWS, N_TASKS = 2**16, 3000, 12
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
    """The view's balanced accuracy minus the model's, averaged over tasks."""
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


def load(seed: int) -> list[Result]:
    """What `run` kept. Raises FileNotFoundError if it was not run."""
    kept = json.loads(kept_file(seed).read_text(encoding="utf-8"))
    return [Result(**result) for result in kept["saes"]]


def rank_correlation(results: Sequence[Result], predictor: str, truth: str) -> float:
    """Spearman's, over SAEs."""
    found = spearmanr([getattr(r, predictor) for r in results], [getattr(r, truth) for r in results])
    return float(found.statistic)


def sae_table(results: Sequence[Result]) -> str:
    """A line per SAE: those that hold most first, those built to deceive last."""
    rows: list[report.Row] = [
        (
            "SAE",
            "",
            "held",
            "matched",
            "MCC",
            "delta_sel",
            "95 % interval",
            "transfer",
            "latent_sel",
            "MSE",
            "FVU",
            "L0",
        )
    ]
    for r in sorted(results, key=lambda r: (r.deceives, -r.held)):
        rows.append(
            (
                r.name,
                "deceives" if r.deceives else "",
                *(f"{value:.3f}" for value in (r.held, r.matched, r.mcc)),
                f"{r.delta_sel:+.3f}",
                f"{r.ci_low:+.3f} .. {r.ci_high:+.3f}",
                f"{r.transfer_delta:+.3f}",
                "-" if r.latent_sel is None else f"{r.latent_sel:.3f}",
                f"{r.mse:.4f}",
                f"{r.fvu:.3f}",
                f"{r.l0:.1f}",
            )
        )
    return report.aligned(rows)


def rank_table(by_seed: Mapping[int, Sequence[Result]]) -> str:
    """Spearman's correlation of every score with every truth in every world; last, the deceivers among the SAEs."""
    rows: list[report.Row] = [("true recovery", "world", "SAEs", *PREDICTORS)]
    for truth in TRUTHS:
        for seed, results in by_seed.items():
            rows.append(_ranks(truth, seed, honest(results)))
    rows += [_ranks("held", seed, results) for seed, results in by_seed.items()]
    return report.aligned(rows)


def _ranks(truth: str, seed: int, results: Sequence[Result]) -> report.Row:
    found = (f"{rank_correlation(results, predictor, truth):+.3f}" for predictor in PREDICTORS)
    return (truth.replace("_", ", "), f"seed {seed}", str(len(results)), *found)


def honest(results: Sequence[Result]) -> list[Result]:
    """Without those built to deceive."""
    return [r for r in results if not r.deceives]


def verdict(results: Sequence[Result]) -> str:
    """What the tables say in a few sentences."""
    ranked = honest(results)
    rho = {predictor: rank_correlation(ranked, predictor, "held") for predictor in PREDICTORS}
    best = max(PREDICTORS, key=lambda predictor: abs(rho[predictor]))
    first = max(ranked, key=lambda r: r.delta_sel).name
    broken = next(r for r in results if SHUFFLED in r.name)
    whole = next(r for r in results if r.name == broken.name.removesuffix(SHUFFLED))
    return (
        f"Over {len(ranked)} SAEs the rank correlation with what is truly held is {rho['delta_sel']:+.3f} for "
        f"delta_sel and {rho['fvu']:+.3f} for FVU; the strongest is {best}'s. First by delta_sel: {first}. "
        f"Shuffling the decoder takes delta_sel from {whole.delta_sel:+.3f} to {broken.delta_sel:+.3f} "
        f"and leaves latent_sel where it was ({whole.latent_sel:.3f}, {broken.latent_sel:.3f})."
    )


def tables() -> str:
    """Every SAE in the first world, the rank correlations in all worlds that were kept, and the verdict."""
    by_seed = {
        seed: load(seed) for seed in sorted(int(path.stem.removeprefix("seed_")) for path in KEPT.glob("*.json"))
    }
    if not by_seed:
        raise SystemExit("nothing was measured yet: python benchmarks/ground_truth.py run")
    first = next(iter(by_seed.values()))
    return "\n\n".join([sae_table(first), rank_table(by_seed), verdict(first)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run"], help="measure first")
    parser.add_argument("--seed", type=int, default=0, help="of the world to run, its rows and its SAEs (%(default)s)")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if asked.what == "run":
        run(asked.seed)
    print(tables())
