"""Test whether delta_sel follows the truth: SAEs from perfect to broken in a world whose features are known.

python -m benchmarks.ground_truth run            # build the world, train, measure (minutes)
python -m benchmarks.ground_truth run --seed 1   # another world and other SAEs
python -m benchmarks.ground_truth                # print the tables of the kept results

A task is the presence of a feature in a row. Each row is a mention of a different person. See docs/ground_truth.md.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scipy.stats import spearmanr

from benchmarks.synthetic_features.result import SHUFFLED, Result
from delta_selectivity.records import result_file
from delta_selectivity.reporting.tables import Row, aligned

PROJECT = Path(__file__).resolve().parent.parent

log = logging.getLogger(__name__)

KEPT = Path(__file__).resolve().with_suffix("")  # folder beside this file
N_TRAIN, N_TRUTH, N_ROWS, N_TASKS = 2**16, 2**14, 3000, 24  # rows for training, for the truth, and for the probes
PREDICTORS = ("delta_sel", "transfer_delta", "mse", "fvu", "l0")
TRUTHS = ("present", "kept", "kept_tasks", "held", "matched", "mcc")


def run(seed: int) -> None:
    """Measure every SAE, and keep the figures."""
    from benchmarks.synthetic_features.bench import N_FOLDS, N_REPEATS, Bench, difference
    from benchmarks.synthetic_features.candidates import all_candidates
    from benchmarks.synthetic_features.world import World, WorldSettings

    world = World.build(WorldSettings(seed=seed))
    bench = Bench.build(world, N_TRUTH, N_ROWS, N_TASKS, seed)
    candidates = all_candidates(world, world.sample(N_TRAIN, seed + 3).x, bench.features, seed)
    (broken,) = (candidate.name for candidate in candidates if SHUFFLED in candidate.name)
    twin = broken.removesuffix(SHUFFLED)
    found, results = {}, []
    for candidate in candidates:
        found[candidate.name] = bench.probe(candidate, latents_view=candidate.name in (broken, twin))
        results.append(bench.result(candidate, found[candidate.name]))
        log.info("%s", results[-1])
    shuffling = difference(found[broken], found[twin])
    config = {"world": asdict(world.settings), "rows": N_ROWS, "tasks": N_TASKS, "folds": N_FOLDS, "repeats": N_REPEATS}
    KEPT.mkdir(exist_ok=True)
    content = {
        "saes": [asdict(result) for result in results],
        "shuffling": {
            "value": shuffling.value,
            "low": shuffling.low,
            "high": shuffling.high,
        },  # shuffled minus original
        "_run": result_file.describe_run(config),
    }
    result_file.write_json(kept_file(seed), content)


def kept_file(seed: int) -> Path:
    return KEPT / f"seed_{seed}.json"


@dataclass(frozen=True)
class StoredWorld:
    """The kept results of one world."""

    saes: list[Result]
    shuffling: dict[str, float]  # value, low, high: sae_sel with the decoder shuffled minus without, paired

    @classmethod
    def load(cls, seed: int) -> StoredWorld:
        """Load the results of a world. Raises FileNotFoundError if that world was not run."""
        kept = json.loads(kept_file(seed).read_text(encoding="utf-8"))
        return cls([Result(**result) for result in kept["saes"]], kept["shuffling"])

    @property
    def without_adversarial(self) -> list[Result]:
        """Return the SAEs without the adversarial ones."""
        return [r for r in self.saes if not r.deceives]


def rank_correlation(results: Sequence[Result], predictor: str, truth: str) -> float:
    """Return Spearman's rank correlation over SAEs."""
    correlation = spearmanr([getattr(r, predictor) for r in results], [getattr(r, truth) for r in results])
    return float(correlation.statistic)


def sae_table(results: Sequence[Result]) -> str:
    """Return a line per SAE: in descending order of what they keep, adversarial ones last."""
    rows: list[Row] = [
        ("SAE", "", "present", "kept", "held", "matched", "MCC", "delta_sel", "95 % interval", "transfer_delta",
         "latent_sel", "MSE", "FVU", "L0")
    ]  # fmt: skip
    for r in sorted(results, key=lambda r: (r.deceives, -r.present)):
        rows.append(
            (
                r.name,
                "deceives" if r.deceives else "",
                *(f"{value:.3f}" for value in (r.present, r.kept, r.held, r.matched, r.mcc)),
                f"{r.delta_sel:+.3f}",
                f"{r.ci_low:+.3f} .. {r.ci_high:+.3f}",
                f"{r.transfer_delta:+.3f}",
                "-" if r.latent_sel is None else f"{r.latent_sel:.3f}",
                f"{r.mse:.4f}",
                f"{r.fvu:.3f}",
                f"{r.l0:.1f}",
            )
        )
    return aligned(rows)


def rank_table(by_seed: Mapping[int, StoredWorld]) -> str:
    """Return Spearman's correlation of every score with every truth in every world; last, over the adversarial SAEs."""
    rows: list[Row] = [("true recovery", "world", "SAEs", *PREDICTORS)]
    rows += [
        _ranks(truth, f"seed {seed}", kept.without_adversarial) for truth in TRUTHS for seed, kept in by_seed.items()
    ]
    for truth in ("present", "kept", "held"):
        rows += [_ranks(truth, f"seed {seed}, deceivers too", kept.saes) for seed, kept in by_seed.items()]
    return aligned(rows)


def _ranks(truth: str, world: str, results: Sequence[Result]) -> Row:
    found = (f"{rank_correlation(results, predictor, truth):+.3f}" for predictor in PREDICTORS)
    return (truth.replace("_", ", "), world, str(len(results)), *found)


def verdict(kept: StoredWorld) -> str:
    """Summarise the tables in a few sentences."""
    broken = next(r for r in kept.saes if SHUFFLED in r.name)
    whole = next(r for r in kept.saes if r.name == broken.name.removesuffix(SHUFFLED))
    ranked = sorted(kept.without_adversarial, key=lambda r: -r.delta_sel)
    lines = [f"{len(ranked)} SAEs that are not built to deceive; first by delta_sel: {ranked[0].name}."]
    for truth, words in (
        ("present", "which features can still be seen"),
        ("kept", "how much of each"),
        ("held", "what is still where it was"),
    ):
        rho = {predictor: rank_correlation(kept.without_adversarial, predictor, truth) for predictor in PREDICTORS}
        best = max(PREDICTORS, key=lambda predictor: abs(rho[predictor]))
        correlations = ", ".join(f"{predictor} {rho[predictor]:+.3f}" for predictor in PREDICTORS)
        lines.append(f"Rank correlation with {words}: {correlations}. The strongest: {best}.")
    change = kept.shuffling
    lines.append(
        f"Shuffling the rows of a trained decoder changes sae_sel by {change['value']:+.3f} "
        f"({change['low']:+.3f} .. {change['high']:+.3f}), transfer_delta from {whole.transfer_delta:+.3f} to "
        f"{broken.transfer_delta:+.3f}, latent_sel from {whole.latent_sel:.3f} to {broken.latent_sel:.3f}."
    )
    return "\n".join(f"- {line}" for line in lines)


def tables() -> str:
    """Return every SAE of the first world, the rank correlations of all kept worlds, and the summary."""
    seeds = sorted(int(path.stem.removeprefix("seed_")) for path in KEPT.glob("seed_*.json"))
    if not seeds:
        raise SystemExit("there are no kept results: python -m benchmarks.ground_truth run")
    by_seed = {seed: StoredWorld.load(seed) for seed in seeds}
    first = by_seed[seeds[0]]
    return "\n\n".join([sae_table(first.saes), rank_table(by_seed), verdict(first)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run"], help="measure first")
    parser.add_argument("--seed", type=int, default=0, help="of the world to run, its rows and its SAEs (%(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.what == "run":
        run(args.seed)
    print(tables())
