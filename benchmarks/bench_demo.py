"""Time the main job on the bundled model, SAEs and tasks, stage by stage: what `scripts/demo.sh` runs.

python -m benchmarks.bench_demo run    # a few minutes
python -m benchmarks.bench_demo        # print the tables of the kept results

`whole` is a run of `main.py` from its start to its end. The other rows are what `report.py --resources` says of it:
stages are summed over threads that run side by side, memory is in GB. Figures are medians of `--repeats` runs after one
that is not counted, in which Numba may have to compile.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import parser, show_or_measure
from delta_selectivity.records.result_file import read
from delta_selectivity.reporting import tables

PROJECT = Path(__file__).resolve().parent.parent

WHOLE = "whole"
QUICK = ["--datasets", "politics", "--layers", "0", "--shuffle_select_n", "100", "--repeats", "1"]


def run(out: Path, quick: bool) -> dict[str, float]:
    """Run once; return the seconds of the whole run and of its stages, and the peak memory in GB."""
    command = [sys.executable, str(PROJECT / "main.py"), "--output_directory", str(out), "--quiet"]
    start = time.perf_counter()
    subprocess.run([*command, *(QUICK if quick else [])], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    runs = [read(path)["_run"] for path in out.rglob("*.json")]  # stages are counted until a file is written
    of_run = max(runs, key=lambda described: described["seconds"]["total"])
    return {WHOLE: seconds, **of_run["seconds"], **of_run["resources"]}


def measure(args: argparse.Namespace) -> list[tables.Row]:
    """Return the rows of the table, header first."""
    runs = []
    for _ in range(1 + args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run(Path(folder), args.quick))
    medians = {name: statistics.median(one[name] for one in runs[1:]) for name in runs[0]}
    rows = [(name, f"{value:.2f}" if name.endswith("_gb") else f"{value:.1f}") for name, value in medians.items()]
    return [("stage", "seconds"), *rows]


def main() -> None:
    args = parser(__doc__).parse_args()
    print(show_or_measure("bench_demo", args, lambda: measure(args)))


if __name__ == "__main__":
    main()
