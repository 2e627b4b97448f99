"""Time `--dtype auto` and each explicit dtype: the whole job on the bundled model.

python -m benchmarks.bench_dtype run    # one task, all layers, two SAEs: minutes; half an hour where bfloat16 is slow
python -m benchmarks.bench_dtype        # print the tables of the kept results

Each run of `main.py` is timed from start to end. The dtypes are run in turn; figures are medians. The last column is
the ratio to the fastest.
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

DTYPES = ("auto", "float32", "bfloat16")
HEADER = ("--dtype", "the model computes in", "whole job, s", "of the fastest")


def run(dtype: str, out: Path, quick: bool) -> tuple[float, str]:
    """Run once; return the seconds and the dtype that was used."""
    command = [sys.executable, str(PROJECT / "main.py"), "--dtype", dtype, "--datasets", "gender", "--quiet"]
    command += ["--output_directory", str(out), "--device1", "cpu"]
    command += ["--shuffle_select_n", "100", "--layers", "0"] if quick else []
    start = time.perf_counter()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    return seconds, read(next(out.rglob("*.json")))["_run"]["key"]["dtype"]


def measure(args: argparse.Namespace) -> list[tables.Row]:
    """Return the rows of the table, header first."""
    seconds: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    taken: dict[str, str] = {}
    for _ in range(args.repeats):
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                spent, taken[dtype] = run(dtype, Path(folder), args.quick)
            seconds[dtype].append(spent)
    medians = {dtype: statistics.median(times) for dtype, times in seconds.items()}
    best = min(medians.values())
    return [HEADER, *((d, taken[d], f"{medians[d]:.1f}", f"{medians[d] / best:.2f}x") for d in DTYPES)]


def main() -> None:
    args = parser(__doc__).parse_args()
    print(show_or_measure("bench_dtype", args, lambda: measure(args)))


if __name__ == "__main__":
    main()
