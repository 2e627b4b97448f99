"""Compare the results of the bundled model in bfloat16, in which it was saved, with those in float32.

python -m benchmarks.dtype_agreement run   # the demo in float32 (minutes), into a folder beside this file
python -m benchmarks.dtype_agreement       # print the table, from results/demo/ and the results of `run`
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from delta_selectivity.reporting import results as report_files
from delta_selectivity.reporting import tables

PROJECT = Path(__file__).resolve().parent.parent

RESULTS = PROJECT / "results" / "demo"
KEPT = Path(__file__).resolve().with_suffix("")  # folder beside this file


def run() -> None:
    """Run the demo in float32."""
    flags = ["--dtype", "float32", "--output_directory", str(KEPT), "--overwrite"]
    subprocess.run([sys.executable, str(PROJECT / "main.py"), *flags], check=True)


def table() -> str:
    """Return, per SAE, the differences between the two runs, and half the width of the interval of delta_sel."""
    rows: list[tables.Row] = [("SAE", "figure", "mean difference", "mean, absolute", "largest, absolute")]
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        pairs = []
        for path, results in report_files.load(report_files.result_files(folder)):
            ((_, other),) = report_files.load([KEPT / folder.name / path.name])
            pairs += list(zip(report_files.cells(results), report_files.cells(other), strict=True))
        for name in ("model_sel", "sae_sel", "delta_sel"):
            apart = [a[3][name] - b[3][name] for a, b in pairs]
            sizes = [abs(value) for value in apart]
            rows.append((folder.name, name, f"{statistics.fmean(apart):+.4f}", f"{statistics.fmean(sizes):.4f}",
                         f"{max(sizes):.4f}"))  # fmt: skip
        half = [(a[3]["ci_high"] - a[3]["ci_low"]) / 2 for a, _ in pairs]
        rows.append((folder.name, "(half the interval)", "", f"{statistics.fmean(half):.4f}", f"{max(half):.4f}"))
    return tables.aligned(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run"], help="run the demo in float32 first")
    if parser.parse_args().what == "run":
        run()
    print(table())
