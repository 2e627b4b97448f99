"""Measure how much an SAE's mean over all layers and probes varies between measurements.

python -m benchmarks.sae_noise run            # the bundled SAEs, five runs of two kinds of draws: a quarter of an hour
python -m benchmarks.sae_noise                # print the table of the kept results
python -m benchmarks.sae_noise run --suite    # the 113 tasks of sae-probes in three runs of `main.py`: half an hour
python -m benchmarks.sae_noise --suite        # print the table of the suite

A set of SAEs has one for each layer, and `main.py` reports the mean over them (`_run.sae_level`). Here, that figure is
measured five times with different rows and folds. Two runs differ by more than 2.77 standard deviations in 5 % of cases
(docs/reliability.md has the same for a single layer, and for k-sparse probing).

With `--suite`, the figure is the mean over the tasks of sae-probes and all layers. Each run has a seed of its own,
which draws the folds and at most 1000 rows of each task. The last column is 2.77 times the standard error from which a
run computes its own interval of the difference. Whole-text figures are of few tokens, because they are not used.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import bundled
from benchmarks.paired_scores import RELIABLE, noise_of_runs
from benchmarks.probe_draws import Pool, Task
from delta_selectivity.probing.probes import choose_backend
from delta_selectivity.probing.selectivity import fit_model, measure, out_of_fold
from delta_selectivity.records import result_file
from delta_selectivity.reporting import tables
from delta_selectivity.saes import open_sae

PROJECT = Path(__file__).resolve().parent.parent

log = logging.getLogger(__name__)

KEPT = Path(__file__).resolve().with_suffix(".json")
KEPT_SUITE = KEPT.with_name("sae_noise_suite.json")
SAES = ("tiny-pythia-saes-k8", "tiny-pythia-saes-k32")
RUNS, ROWS = range(1, 6), 3000
FIGURES = ("delta_sel", "transfer_delta", "transfer_r2")
SUITE_FIGURES = ("delta_sel", "transfer_r2")
SUITE_RUNS, SUITE_ROWS = range(1, 4), 1000
Level = dict[str, dict[str, float]]  # SAE -> figure -> its mean over layers and probes


def run() -> None:
    """Measure, and keep the figures."""
    pool = Pool.load()
    sources = {name: open_sae(str(bundled.MODEL.parent / name)) for name in SAES}
    layers = next(iter(sources.values())).layers
    x = bundled.activations(pool.texts.mentions, layers)
    recons = {}
    for layer in layers:
        for name, source in sources.items():
            sae = source.load(layer, "cpu")
            recons[layer, name] = sae.decode(sae.encode(x[layer]))
    levels: dict[str, list[Level]] = {}
    for kind, tasks in _draws(pool):
        levels.setdefault(kind, []).append(_sae_level(tasks, x, recons))
        log.info("%s: %s", kind, levels[kind][-1])
    config = {"rows": ROWS, "layers": list(layers), "runs": len(RUNS)}
    result_file.write_json(KEPT, {"levels": levels, "_run": result_file.describe_run(config)})


def _draws(pool: Pool) -> Iterator[tuple[str, list[Task]]]:
    for seed in RUNS:
        yield "people and folds", pool.bootstrap(ROWS, seed)
        yield f"--shuffle_select_n {ROWS}, folds", pool.program_draw(ROWS, seed, seed)


def _sae_level(tasks: list[Task], x: Mapping[int, Tensor], recons: Mapping[tuple[int, str], Tensor]) -> Level:
    backend, _ = choose_backend("torch", "cpu")
    found: dict[str, dict[str, list[float]]] = {name: {figure: [] for figure in FIGURES} for name in SAES}
    for layer, values in x.items():
        for task in tasks:
            rows = torch.from_numpy(task.rows)
            model = fit_model(task.plan, values[rows], backend)
            for name in SAES:
                for result in measure(out_of_fold(task.plan, model, recons[layer, name][rows], backend)):
                    for figure in FIGURES:
                        found[name][figure].append(getattr(result, figure))
    return {name: {figure: float(np.mean(each)) for figure, each in own.items()} for name, own in found.items()}


def run_suite() -> None:
    """Run `main.py` on the suite with three seeds, and keep the figures after each run."""
    runs: list[Level] = []
    errors: list[dict[str, float]] = []  # per run: figure -> standard error of the difference
    for seed in SUITE_RUNS:
        with tempfile.TemporaryDirectory(prefix="delta-selectivity-") as out:
            program = [sys.executable, str(PROJECT / "main.py"), "--quiet", "--output_directory", out]
            flags = ["--datasets", "sae-probes", "--shuffle_select_n", str(SUITE_ROWS), "--whole_tokens", "1000"]
            subprocess.run([*program, *flags, "--seed", str(seed)], check=True, stdout=subprocess.DEVNULL)
            levels = {name: _stored_level(Path(out) / name) for name in SAES}
        runs.append(
            {name: {figure: level["tasks"][figure] for figure in SUITE_FIGURES} for name, level in levels.items()}
        )
        (compared,) = levels[SAES[0]]["compared"].values()
        errors.append({figure: _standard_error(compared, figure) for figure in SUITE_FIGURES})
        log.info("seed %d: %s %s", seed, runs[-1], errors[-1])
        config = {"rows": SUITE_ROWS, "runs": len(runs)}
        stored = {"levels": {f"--shuffle_select_n {SUITE_ROWS}, folds": runs}, "errors": errors}
        result_file.write_json(KEPT_SUITE, {**stored, "_run": result_file.describe_run(config)})


def _stored_level(folder: Path) -> result_file.Json:
    """Return `_run.sae_level` of an SAE in a finished run; each of its files has it."""
    level: result_file.Json = json.loads(next(folder.glob("*.json")).read_text("utf-8"))["_run"]["sae_level"]
    return level


def _standard_error(level: result_file.Json, figure: str) -> float:
    return float(level[f"{figure}_ci_high"] - level[f"{figure}_ci_low"]) / (2 * 1.96)


def table(levels: Mapping[str, list[Level]], errors: Sequence[Mapping[str, float]] = ()) -> str:
    """Return a line per figure and kind of draw; `errors`: figure -> standard error of the difference in each run."""
    rows: list[tables.Row] = [
        ("figure", "drawn anew", *(f"{name}, mean" for name in SAES), "SD of one", "2.77 SD", "SD of the difference",
         "2.77 SD", *(["by the runs' own intervals"] if errors else []))
    ]  # fmt: skip
    for figure in SUITE_FIGURES if errors else FIGURES:
        for kind, runs in levels.items():
            by_sae = {name: [run[name][figure] for run in runs] for name in SAES}
            one = noise_of_runs(by_sae)
            two = noise_of_runs({"difference": [a - b for a, b in zip(*by_sae.values(), strict=True)]})
            means = (f"{np.mean(values):+.4f}" for values in by_sae.values())
            noise = (f"{one:.4f}", f"{RELIABLE * one:.4f}", f"{two:.4f}", f"{RELIABLE * two:.4f}")
            own = [f"{RELIABLE * np.mean([error[figure] for error in errors]):.4f}"] if errors else []
            rows.append((figure, kind, *means, *noise, *own))
    return tables.aligned(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run"], help="measure first")
    parser.add_argument("--suite", action="store_true", help="the tasks of sae-probes")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parser.parse_args()
    if args.what == "run":
        run_suite() if args.suite else run()
    kept = json.loads((KEPT_SUITE if args.suite else KEPT).read_text(encoding="utf-8"))
    print(table(kept["levels"], kept.get("errors", ())))
