"""Compare the reliability of delta_sel, k-sparse probing and FVU: noise over runs, and SAEs that they distinguish.

python -m benchmarks.reliability run --corpus people_text.jsonl.xz   # train and measure; resumes an earlier run
python -m benchmarks.reliability                                     # print the tables of the kept results
python -m scripts.update_tables docs/reliability.md                  # update the document
python -m benchmarks.reliability run --model_name smollm2-135m --corpus WORK_DIR   # of `scripts.train_saes harvest`
python -m benchmarks.reliability run ... --rows 3000                               # the same SAEs, more rows
python -m benchmarks.reliability run ... --transfer_only             # only scores of the model's own probes: minutes

Uses two of the three lenses of "Are Sparse Autoencoder Benchmarks Reliable?" (Chanin 2026, arXiv 2605.18229), on one
layer of the bundled model and of SmolLM2-135M. The third, correlation with ground truth, is
`benchmarks/ground_truth.py`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from benchmarks import reliability_tables
from benchmarks.paired_scores import Errors, Parts, by_partition, difference, fvu_difference, noise_of_folds
from benchmarks.probe_draws import Pool, Task, draw_people, rows_of_people
from benchmarks.reliability_tables import RESAMPLED, Pairs, Reliability
from benchmarks.reliability_work import KS, Work, errors_at
from benchmarks.sae_families import STUDIES, TINY_PYTHIA, Study
from benchmarks.sae_panel import PairSet, noise_panel, pair_sets, panel
from delta_selectivity.errors import RequestError
from delta_selectivity.probing.probe_statistics import ProbeScores, auc_parts, bits, correct, r2_parts
from delta_selectivity.probing.selectivity import OUTLIER

PROJECT = Path(__file__).resolve().parent.parent
FEW_ROWS = 600  # per dataset: 3000 in total

GIVEN_C = "transfer_r2, C as given"
"""transfer_r2 with intervals that leave out what the choice of C adds, as before version 1.0."""
METRICS: dict[str, tuple[str, Parts]] = {  # name -> its view, and the contribution of each row; higher is better
    "delta_sel": ("sae", correct),
    "delta_auc": ("sae", auc_parts),
    "delta_bits": ("sae", bits),
    "transfer_delta": ("transfer", correct),
    "transfer_delta in AUC": ("transfer", auc_parts),
    "transfer_delta in bits": ("transfer", bits),
    "transfer_r2": ("transfer", r2_parts),
    GIVEN_C: ("transfer", r2_parts),
    **{f"k-sparse, k = {k}, balanced accuracy": (f"k{k}", correct) for k in KS},
    **{f"k-sparse, k = {k}, AUC": (f"k{k}", auc_parts) for k in KS},
}
NO_SINKS, WITH_SINKS = "sinks left out", "sinks kept"
"""FVU without rows whose norm is above 10 times the median, and transfer_r2 with them; only if there are such rows."""
FVU_PROBED, FVU_HELD_OUT = "FVU, probed positions", "FVU, held-out text"  # lower is better

Runs = dict[str, dict[str, dict[str, list[float]]]]  # what is resampled -> metric -> SAE -> its score in each run


def levels(probes: Sequence[ProbeScores], metric: str) -> NDArray[np.floating]:
    """Return one SAE's score by partition; for differences, minus the model's own score."""
    view, parts = METRICS[metric]
    own = by_partition(probes, view, parts)
    return own - by_partition(probes, "model", parts) if view in ("sae", "transfer") else own


@dataclass(frozen=True)
class Draw:
    """The rows and folds of one run."""

    kind: str  # what is resampled from run to run
    name: str
    seed: int
    tasks: list[Task]


def repeated_draws(pool: Pool, study: Study) -> Iterator[Draw]:
    """Return several runs of each kind."""
    for run in study.runs:
        yield Draw(RESAMPLED, f"bootstrap_{study.rows}_{run}", run, pool.bootstrap(study.rows, run))
        for kind, rows in {"the program's draw, folds": study.rows, "the same, 3000 rows in all": FEW_ROWS}.items():
            yield Draw(kind, f"draw_{rows}_{run}", run, pool.program_draw(rows, run, run))


def repeated_runs(work: Work, pool: Pool, errors: Mapping[str, Mapping[str, Errors]]) -> Runs:
    """Lens 1: measure the same SAEs repeatedly."""
    x, saes, runs = work.probed_activations(pool), noise_panel(work.study), Runs()
    for draw in repeated_draws(pool, work.study):
        work.probe(draw.name, draw.tasks, saes, x)
        for snapshot in saes:
            probes = work.scores(draw.name, snapshot)
            values = {metric: float(levels(probes, metric).mean()) for metric in METRICS}
            texts = errors[FVU_HELD_OUT][snapshot.name].clusters
            rows = {
                FVU_PROBED: np.concatenate([task.rows for task in draw.tasks]),
                FVU_HELD_OUT: rows_of_people(draw_people(texts, np.random.default_rng(draw.seed)), texts, len(texts)),
            }
            values |= {metric: errors[metric][snapshot.name].of(drawn).fvu for metric, drawn in rows.items()}
            for metric, value in values.items():
                runs.setdefault(draw.kind, {}).setdefault(metric, {}).setdefault(snapshot.name, []).append(value)
    return runs


def compare(
    sets: Sequence[PairSet],
    probes: Mapping[str, Mapping[str, list[ProbeScores]]],
    errors: Mapping[str, Mapping[str, Errors]],
) -> list[Pairs]:
    """Lens 3: return the difference of every score between the better and the worse SAE of each pair.

    probes: score -> SAE -> its probes.
    """
    found = [Pairs(each.kind, each.family, each.change, each.names, {}) for each in sets]
    for metric, by_sae in probes.items():
        view, parts = METRICS[plain(metric)]
        shares = {name: [parts(probe, view) for probe in of_sae] for name, of_sae in by_sae.items()}
        for each in found:
            gains = [
                difference(
                    shares[better], shares[worse], by_sae[better], level_varies=parts is r2_parts and metric != GIVEN_C
                )
                for worse, better in each.saes
            ]
            each.gains[metric] = [(gain.value, gain.low, gain.high) for gain in gains]
    for metric, errors_of in errors.items():
        for each in found:
            gains = [fvu_difference(errors_of[worse], errors_of[better]) for worse, better in each.saes]
            each.gains[metric] = [(gain.value, gain.low, gain.high) for gain in gains]
    return found


def plain(metric: str) -> str:
    """Return the score's name, without the suffix for its rows."""
    return metric.removesuffix(f", {WITH_SINKS}")


def measure(work: Work) -> Reliability:
    """Run all stages."""
    study = work.study
    pool, saes = Pool.load(None if study.runs else study.rows), panel(study)
    corpus, x = work.corpus_activations(), work.probed_activations(pool)
    work.train(saes, corpus.train)
    tasks = pool.program_draw(study.rows, seed=0, fold_seed=0)
    panel_draw = f"panel_{study.rows}"
    work.probe(panel_draw, tasks, saes, x)
    persons, texts = pool.texts.persons, corpus.held_out_text.numpy()
    errors = {
        FVU_PROBED: {s.name: errors_at(x, work.sae(s), persons) for s in saes},
        FVU_HELD_OUT: {s.name: errors_at(corpus.held_out, work.sae(s), texts) for s in saes},
    }
    runs = {} if work.transfer_only else repeated_runs(work, pool, errors)
    rows = np.concatenate([task.rows for task in tasks])
    on_panel = {**errors, FVU_PROBED: {name: found.of(rows) for name, found in errors[FVU_PROBED].items()}}
    all_rows = {snapshot.name: work.scores(panel_draw, snapshot) for snapshot in saes}
    metrics = [name for name, (view, _) in METRICS.items() if view == "transfer" or not work.transfer_only]
    probes = dict.fromkeys(metrics, all_rows)
    norm = torch.linalg.vector_norm(x, dim=1)
    sink = (norm > OUTLIER * norm.median()).numpy()
    if sink[rows].any():
        probes[f"transfer_r2, {WITH_SINKS}"] = {
            name: [replace(probe, outliers=None) for probe in of_sae] for name, of_sae in all_rows.items()
        }
        kept = rows[~sink[rows]]
        on_panel[f"{FVU_PROBED}, {NO_SINKS}"] = {name: found.of(kept) for name, found in errors[FVU_PROBED].items()}
    partitions = {
        metric: {name: levels(found, plain(metric)) for name, found in by_sae.items()}
        for metric, by_sae in probes.items()
    }
    return Reliability(
        n_sinks=int(sink[rows].sum()),
        model_name=study.model_name,
        layer=study.layer,
        rows_per_dataset=study.rows,
        n_rows=int(sum(len(task.rows) for task in tasks)),
        n_people=len(np.unique(persons[rows])),
        n_probes=sum(len(task.names) for task in tasks),
        levels={
            snapshot.name: {metric: float(by_sae[snapshot.name].mean()) for metric, by_sae in partitions.items()}
            | {metric: by_sae[snapshot.name].fvu for metric, by_sae in on_panel.items()}
            for snapshot in saes
        },
        fold_noise={metric: noise_of_folds(list(by_sae.values())) for metric, by_sae in partitions.items()}
        | dict.fromkeys(on_panel, 0.0),
        runs=runs,
        pairs=compare(pair_sets(study), probes, on_panel),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run"], help="train and measure first")
    parser.add_argument("--model_name", choices=STUDIES, default=TINY_PYTHIA.model_name, help="model to study")
    parser.add_argument(
        "--corpus",
        type=Path,
        help="to train the SAEs on: text (JSON lines, xz, with `text` and `source`), or kept activations of the model",
    )
    parser.add_argument("--rows", type=int, help="of a dataset, in place of the study's own")
    parser.add_argument(
        "--transfer_only", action="store_true", help="only scores of the model's own probes: minutes, not hours"
    )
    parser.add_argument(
        "--work_dir", type=Path, default=PROJECT / "results" / "reliability", help="folder of intermediate results"
    )
    args = parser.parse_args()
    study = STUDIES[args.model_name]
    study = replace(study, rows=args.rows or study.rows)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.what == "run":
        torch.set_num_threads(1)
        threadpool_limits(1)  # makes the numbers independent of the number of cores
        try:
            of_model = "" if study.model_name == TINY_PYTHIA.model_name else study.model_name
            folder = args.work_dir / of_model / f"layer_{study.layer}"
            reliability_tables.keep(measure(Work(folder, study, args.corpus, args.transfer_only)), args.transfer_only)
        except RequestError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    kept = reliability_tables.kept(study.model_name, study.rows, args.transfer_only)
    print(reliability_tables.tables(kept, only_sure=args.transfer_only))
    return 0


if __name__ == "__main__":
    sys.exit(main())
