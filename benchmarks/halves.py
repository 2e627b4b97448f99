"""Check the intervals on real activations: how often does that of one half of the people cover the other half's value?

python -m benchmarks.halves run    # the bundled model and SAEs, two layers, ten splits: ten minutes
python -m benchmarks.halves        # print the table of the kept results

The people of the Wikidata tasks are split into two halves, at random and the same in all tasks, and each half is
measured by itself, with its own folds and its own choice of C. The halves share no row, so their difference should
exceed its 95 % interval in one case of twenty. Unlike in a simulation, nothing is assumed of the activations.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import bundled
from benchmarks.probe_draws import Pool, Task
from delta_selectivity.probing.probe_statistics import ProbeScores, auc_parts, bits, correct, r2_parts
from delta_selectivity.probing.probes import choose_backend
from delta_selectivity.probing.selectivity import fit_model, out_of_fold
from delta_selectivity.probing.uncertainty import Cell, Estimate, estimate_mean, sum_freedom
from delta_selectivity.records import result_file
from delta_selectivity.reporting import tables
from delta_selectivity.system.processor import cpu_count

KEPT = Path(__file__).resolve().with_suffix(".json")
SAES = ("tiny-pythia-saes-k8", "tiny-pythia-saes-k32")
LAYERS, SPLITS, MOST_ROWS = (1, 4), range(10), 800

log = logging.getLogger(__name__)


class Difference(NamedTuple):
    """One half's estimate minus the other's."""

    value: float
    standard_error: float
    covered: bool  # whether the 95 % interval includes 0

    @classmethod
    def of(cls, a: Estimate, b: Estimate) -> Difference:
        """Subtract two independent estimates."""
        parts = [(each.standard_error**2, each.degrees_of_freedom) for each in (a, b)]
        both = Estimate(a.value - b.value, sum(square for square, _ in parts) ** 0.5, sum_freedom(parts))
        return cls(both.value, both.standard_error, both.low <= 0 <= both.high)


def run() -> None:
    """Measure, and keep each difference of two halves by figure."""
    pool = Pool.load()
    x = bundled.activations(pool.texts.mentions, LAYERS)
    recons = {layer: {name: bundled.reconstructions(x[layer], name, layer) for name in SAES} for layer in LAYERS}
    found: dict[str, list[Difference]] = {}
    jobs = [(layer, split) for layer in LAYERS for split in SPLITS]

    def differences(job: tuple[int, int]) -> list[tuple[str, Difference]]:
        layer, split = job
        return list(_differences(pool.halves(MOST_ROWS, split), x[layer], recons[layer]))

    with ThreadPoolExecutor(cpu_count()) as threads:
        for number, done in enumerate(threads.map(differences, jobs), 1):
            for figure, difference in done:
                found.setdefault(figure, []).append(difference)
            log.info("%d of %d", number, len(jobs))
    config = {"layers": list(LAYERS), "splits": len(SPLITS), "rows": MOST_ROWS}
    result_file.write_json(KEPT, {"differences": found, "_run": result_file.describe_run(config)})


def _differences(
    tasks: Sequence[list[Task]], x: Tensor, recons: Mapping[str, Tensor]
) -> Iterator[tuple[str, Difference]]:
    halves = [_cells(of_half, x, recons) for of_half in tasks]
    for figure, cells in halves[0].items():
        pairs = [(cell, halves[1][figure][probe]) for probe, cell in cells.items() if probe in halves[1][figure]]
        variants = {"": pairs}
        if figure.startswith("transfer_r2"):
            fixed = [(replace(a, level_varies=False), replace(b, level_varies=False)) for a, b in pairs]
            variants[", without the level's part"] = fixed
        for variant, chosen in variants.items():
            for a, b in chosen:
                yield f"{figure}{variant}", Difference.of(estimate_mean([a]), estimate_mean([b]))
            a_cells, b_cells = map(list, zip(*chosen, strict=True))
            mean = Difference.of(estimate_mean(a_cells), estimate_mean(b_cells))
            yield f"{figure}{variant}, mean over probes", mean


def _cells(tasks: list[Task], x: Tensor, recons: Mapping[str, Tensor]) -> dict[str, dict[str, Cell]]:
    """Return figure -> probe -> its contributions by row."""
    backend, _ = choose_backend("torch", "cpu")
    found: dict[str, dict[str, Cell]] = {}
    for task in tasks:
        rows = torch.from_numpy(task.rows)
        model = fit_model(task.plan, x[rows], backend)
        scores = {name: out_of_fold(task.plan, model, recon[rows], backend) for name, recon in recons.items()}
        for t, place in enumerate(task.plan.kept):
            probes = {name: each.probe(t) for name, each in scores.items()}
            for figure, cell in _figures(probes).items():
                found.setdefault(figure, {})[task.names[place]] = cell
    return found


def _figures(probes: Mapping[str, ProbeScores]) -> dict[str, Cell]:
    """Return the cells of one probe: of each SAE, and of their difference."""
    of_view = {"delta_sel": correct, "delta_auc": auc_parts, "delta_bits": bits}
    parts = {
        figure: {name: part(p, "sae") - part(p, "model") for name, p in probes.items()}
        for figure, part in of_view.items()
    }
    parts["transfer_r2"] = {name: r2_parts(p, "transfer") for name, p in probes.items()}
    rows = next(iter(probes.values()))
    found = {}
    for figure, by_sae in parts.items():
        of = {**by_sae, "difference": by_sae[SAES[1]] - by_sae[SAES[0]]}
        for name, change in of.items():
            cell = Cell(change, rows.labels, rows.persons, rows.weights, rows.n_folds, figure == "transfer_r2")
            found[f"{figure}, {name}"] = cell
    return found


def table(found: Mapping[str, list[list[float]]]) -> str:
    """Return a line per figure: how often intervals covered; in brackets, differences in standard errors."""
    columns = (*SAES, "difference")
    rows: list[tables.Row] = [("figure", "pairs of halves", *columns)]
    for kind in dict.fromkeys(key.replace(f", {SAES[0]}", "") for key in found if f", {SAES[0]}" in key):
        figure, _, rest = kind.partition(", ")
        shown, n = [], 0
        for column in columns:
            values, errors, covered = np.array(found[", ".join(filter(None, (figure, column, rest)))]).T
            size, n = np.sqrt(np.mean(np.square(values / errors))), len(values)
            shown.append(f"{covered.mean():.1%} ({size:.2f})")
        rows.append((kind, str(n), *shown))
    return tables.aligned(rows)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run"], help="measure first")
    args = parser.parse_args()
    if args.what == "run":
        run()
    print(table(json.loads(KEPT.read_text(encoding="utf-8"))["differences"]))
