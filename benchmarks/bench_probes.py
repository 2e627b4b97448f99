"""Compare the batched probe solver with scikit-learn: milliseconds per fit, and distance from the optimum.

python -m benchmarks.bench_probes run       # all sizes, an hour on two cores; keeps the figures beside this file
python -m benchmarks.bench_probes run --threads 1 --cpu_time   # CPU seconds, for a machine with other load
python -m benchmarks.bench_probes run --sizes 5000x768 --probes 1,8
python -m benchmarks.bench_probes           # print the table of the kept results
python -m benchmarks.bench_probes --quick   # measure and print one small size, without keeping it: seconds

All sides solve the same problem, five folds of each probe, with the same number of threads, in turn in one process.
Figures are medians over the rounds. The batched solver solves all fits at once. Its time includes centring, scaling and
the preconditioner, and is divided by the number of fits (C x probes x folds). Scikit-learn gets a matrix that is
already centred and scaled. It is timed on the first fold of the first and the last probe for every C, and the table has
the mean over these fits. Its lbfgs uses the loosest tolerance (a power of ten) whose largest error is no worse than
ours, or the tightest one tried, 1e-10. It starts from zero for each C ("cold", the common use) or from the solution at
the smaller C ("warm", the best case). Errors are |w - w*| / |w*|, the largest over the timed fits; w* is computed by
newton-cholesky in float64 at tolerance 1e-9.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from delta_selectivity.probing.backends.problem import balanced
from delta_selectivity.probing.backends.torch_lbfgs import TorchLbfgs
from delta_selectivity.probing.probes import ProbeProblem
from delta_selectivity.records import result_file
from delta_selectivity.reporting import tables

PROJECT = Path(__file__).resolve().parent.parent

KEPT = Path(__file__).resolve().with_suffix(".json")
SIZES, PROBES, FOLDS = ((2000, 128), (5000, 768), (10_000, 1024)), (1, 8, 16), 5
PATH, ONE = tuple(10.0**k for k in range(-5, 2)), (0.01,)
TIGHT = 1e-9  # tolerance of the reference solution


@dataclass(frozen=True)
class Line:
    """One problem, solved by each side. Times are milliseconds per fit; errors are relative to newton-cholesky."""

    rows: int
    d: int
    probes: int
    cs: int
    ours: float
    error: float
    cold: float
    cold_error: float
    warm: float  # cold, for a single C
    warm_error: float
    newton: float


@dataclass(frozen=True)
class Single:
    """One probe on one training fold, in scikit-learn's form."""

    probe: int
    x: NDArray[np.float64]  # [rows, d], standardised
    label: NDArray[np.bool_]
    weight: NDArray[np.float64]  # balanced class weights

    def path(self, cs: Sequence[float], solver: str, tolerance: float, warm: bool) -> NDArray[np.float64]:
        """Fit every C; return the coefficients [cs, d]."""
        model = LogisticRegression(solver=solver, tol=tolerance, max_iter=100_000, warm_start=warm)
        found = [model.set_params(C=c).fit(self.x, self.label, sample_weight=self.weight).coef_[0].copy() for c in cs]
        return np.stack(found)


def draw(rows: int, d: int, probes: int, cs: Sequence[float], seed: int = 0) -> ProbeProblem:
    """Draw features with a falling spectrum and unequal scales, like activations; labels depend on one direction each.

    The share of positives falls from 1/2 to 1/5 over the probes.
    """
    random = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(d, d, generator=random))
    x = (torch.randn(rows, d, generator=random) * torch.arange(1, d + 1) ** -0.5) @ turn
    x = (x + torch.randn(d, generator=random)) * (0.5 * torch.randn(d, generator=random)).exp()
    signal = (x - x.mean(dim=0)) / x.std(dim=0) @ torch.randn(d, probes, generator=random)
    signal = signal / signal.std(dim=0) + torch.randn(rows, probes, generator=random)
    labels = torch.stack([s > s.quantile(0.5 + 0.3 * i / probes) for i, s in enumerate(signal.T)])
    weight = (torch.randperm(rows, generator=random) % FOLDS != torch.arange(FOLDS)[:, None]).double()
    scale = torch.stack([x[kept > 0].double().std(dim=0, correction=0) for kept in weight])
    return ProbeProblem(x, labels, weight, scale, tuple(cs))


def singles(problem: ProbeProblem) -> list[Single]:
    """Return the first fold of the first and of the last probe."""
    train = problem.weight[0] > 0
    x = problem.x[train].double()
    x = (x - x.mean(dim=0)) / problem.scale[0]
    found = []
    for probe in sorted({0, problem.n_targets - 1}):
        label = problem.labels[probe][train]
        weight = balanced(label, problem.weight[0][train])
        found.append(Single(probe, x.numpy(), label.numpy(), weight.numpy()))
    return found


def measure(
    rows: int,
    d: int,
    probes: int,
    cs: Sequence[float],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Line:
    """Time all sides on one problem; `clock` returns seconds."""
    problem, backend = draw(rows, d, probes, cs), TorchLbfgs()
    tasks = singles(problem)
    exact = [task.path(cs, "newton-cholesky", TIGHT, warm=False) for task in tasks]

    def error(found: Sequence[NDArray[np.float64]]) -> float:
        return max(
            float((np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).max())
            for a, b in zip(found, exact, strict=True)
        )

    fits = backend.fit(problem)
    assert bool(fits.converged.all())
    ours = error([(fits.coef[:, task.probe, 0] * problem.scale[0]).numpy() for task in tasks])
    cold, cold_error = _loosest(tasks, cs, ours, error, warm=False)
    warm, warm_error = _loosest(tasks, cs, ours, error, warm=True)
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: backend.fit(problem),
        "cold": lambda: [task.path(cs, "lbfgs", cold, warm=False) for task in tasks],
        "warm": lambda: [task.path(cs, "lbfgs", warm, warm=True) for task in tasks],
        "newton": lambda: [task.path(cs, "newton-cholesky", TIGHT, warm=False) for task in tasks],
    }
    n_fits = {"ours": len(cs) * probes * FOLDS}
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for _, (name, work) in product(range(rounds), sides.items()):
        start = clock()
        work()
        spent[name].append(1e3 * (clock() - start) / n_fits.get(name, len(cs) * len(tasks)))
    times = {name: statistics.median(values) for name, values in spent.items()}
    return Line(rows, d, probes, len(cs), error=ours, cold_error=cold_error, warm_error=warm_error, **times)


def _loosest(
    tasks: Sequence[Single],
    cs: Sequence[float],
    wanted: float,
    error: Callable[[Sequence[NDArray[np.float64]]], float],
    warm: bool,
) -> tuple[float, float]:
    """Return the loosest tolerance at which lbfgs is at least as close to the optimum as wanted, and its distance."""
    for power in range(4, 11):
        found = error([task.path(cs, "lbfgs", 10.0**-power, warm) for task in tasks])
        if found <= wanted:
            break
    return 10.0**-power, found


def table(lines: Sequence[Line]) -> str:
    """Return a line per problem; ratios are the time of the other side divided by ours."""
    rows: list[tables.Row] = [
        ("rows x d", "probes x folds x C", "ours, ms/fit", "error", "lbfgs cold, ms/fit", "error", "ratio",
         "lbfgs warm, ms/fit", "error", "ratio", "newton-cholesky, ms/fit", "ratio")
    ]  # fmt: skip
    for line in lines:
        rows.append(
            (f"{line.rows} x {line.d}", f"{line.probes} x {FOLDS} x {line.cs}", f"{line.ours:.2f}",
             f"{line.error:.0e}", f"{line.cold:.0f}", f"{line.cold_error:.0e}", f"{line.cold / line.ours:.0f}x",
             f"{line.warm:.0f}", f"{line.warm_error:.0e}", f"{line.warm / line.ours:.0f}x",
             f"{line.newton:.0f}", f"{line.newton / line.ours:.0f}x")
        )  # fmt: skip
    return tables.aligned(rows)


def run(sizes: Sequence[tuple[int, int]], probes: Sequence[int], rounds: int, clock: Callable[[], float]) -> None:
    """Measure, and keep the figures after every line."""
    lines = []
    for (rows, d), n, cs in product(sizes, probes, (ONE, PATH)):
        lines.append(measure(rows, d, n, cs, rounds, clock))
        print(table(lines[-1:]), file=sys.stderr)
        config = {"rounds": rounds, "threads": torch.get_num_threads(), "clock": clock.__name__}
        result_file.write_json(
            KEPT, {"lines": [asdict(line) for line in lines], "_run": result_file.describe_run(config)}
        )


def _sizes(text: str) -> list[tuple[int, int]]:
    return [(int(rows), int(d)) for rows, d in (size.split("x") for size in text.split(","))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run"], help="measure first")
    parser.add_argument("--sizes", type=_sizes, default=SIZES, help="rows x d, separated by commas: 2000x128,5000x768")
    parser.add_argument("--probes", type=lambda text: [int(n) for n in text.split(",")], default=PROBES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="for every side")
    parser.add_argument("--cpu_time", action="store_true", help="on a busy machine, with --threads 1: CPU seconds")
    parser.add_argument("--quick", action="store_true", help="one small size, nothing kept")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    with threadpool_limits(args.threads):
        if args.quick:
            print(table([measure(1500, 96, n, cs, 1, clock) for n, cs in product((1, 3), (ONE, PATH))]))
            return
        if args.what == "run":
            run(args.sizes, args.probes, args.rounds, clock)
    print(table([Line(**line) for line in json.loads(KEPT.read_text(encoding="utf-8"))["lines"]]))


if __name__ == "__main__":
    main()
