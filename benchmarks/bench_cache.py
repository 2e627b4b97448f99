"""Time a second SAE after the first has filled `--cache_dir`: the whole job with a cold and a warm cache.

python -m benchmarks.bench_cache run    # the bundled SAEs, in both orders: ten minutes
python -m benchmarks.bench_cache        # print the table of the kept results

A pair is two runs of `main.py` on all data with a fresh cache, each timed from start to end: the first SAE cold, then
the second warm. Both pairs are run in turn, `--repeats` times; figures are medians. The last columns are the ratios to
the cold run of the pair and to the cold run of the same SAE.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import parser, show_or_measure
from delta_selectivity.reporting import tables

PROJECT = Path(__file__).resolve().parent.parent

SAES = ("tiny-pythia-saes-k8", "tiny-pythia-saes-k32")
QUICK = ["--datasets", "politics", "--layers", "0,1", "--shuffle_select_n", "100", "--repeats", "1"]
STAGES = ("forward", "sae", "probes")
HEADER = ("SAE", "cache", "whole job, s", "forward, s", "SAE, s", "probes, s", "cold, its pair", "cold, same SAE")


@dataclass(frozen=True)
class Run:
    """One run of `main.py`, or the medians of several."""

    sae: str
    warm: bool
    seconds: float  # seconds from the start to the end of the process
    stages: dict[str, float]  # stage -> seconds, summed over threads

    @classmethod
    def of(cls, sae: str, cache: Path, out: Path, flags: list[str]) -> Run:
        """Measure an SAE on all tasks and layers with this cache."""
        warm = cache.exists()
        command = [sys.executable, str(PROJECT / "main.py"), "--sae_name", str(PROJECT / "assets" / sae), "--quiet"]
        command += ["--cache_dir", str(cache), "--output_directory", str(out), *flags]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        runs = [json.loads(path.read_text(encoding="utf-8"))["_run"]["seconds"] for path in out.glob("*.json")]
        return cls(sae, warm, seconds, max(runs, key=lambda stages: stages["total"]))

    @classmethod
    def median(cls, runs: Sequence[Run]) -> Run:
        """Return the medians of runs of one SAE, all cold or all warm."""
        stages = {name: statistics.median(run.stages[name] for run in runs) for name in STAGES}
        return cls(runs[0].sae, runs[0].warm, statistics.median(run.seconds for run in runs), stages)


def measure(args: argparse.Namespace) -> list[tables.Row]:
    """Measure both pairs."""
    flags = QUICK if args.quick else []
    measured: list[list[Run]] = []
    for _ in range(args.repeats):
        once = []
        for first, second in (SAES, SAES[::-1]):
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder)
                once += [Run.of(sae, place / "cache", place / sae, flags) for sae in (first, second)]
        measured.append(once)
    runs = [Run.median(same) for same in zip(*measured, strict=True)]
    cold = {run.sae: run.seconds for run in runs if not run.warm}
    rows: list[tables.Row] = [HEADER]
    for run in runs:
        pair = next(sae for sae in SAES if sae != run.sae)
        shares = [f"{cold[sae] / run.seconds:.1f}x" for sae in (pair, run.sae)] if run.warm else ["", ""]
        stages = [f"{run.stages[stage]:.0f}" for stage in STAGES]
        rows.append((run.sae, "warm" if run.warm else "cold", f"{run.seconds:.0f}", *stages, *shares))
    return rows


def main() -> None:
    args = parser(__doc__).parse_args()
    print(show_or_measure("bench_cache", args, lambda: measure(args)))


if __name__ == "__main__":
    main()
