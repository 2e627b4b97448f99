"""Time the 113 tasks of sae-probes on the bundled model with two SAEs, and that package on the same rows.

python -m benchmarks.bench_suite run --environment ~/sae-probes    # creates the environment if it is missing
python -m benchmarks.bench_suite                                   # print the table of the kept results

`main.py` is timed as a whole, from its start to its last file, with at most 400 rows of each task. `sae-probes` 0.4.2
gets the same rows of one task in 24, hook by hook as its README runs it: its baseline probe, and k-sparse probes with k
1 and 16 on each SAE. Its forward passes are scaled up by characters and its probes by tasks, so its figures are rough.
It fits one split; this program fits five times five folds, on activations and on two reconstructions.
"""

from __future__ import annotations

import csv
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.bench_end_to_end import DRIVER, PACKAGE, PROJECT, make_environment, run_driver
from benchmarks.bundled import MODEL
from benchmarks.timing import parser, show_or_measure
from delta_selectivity.reporting import tables

SAES = (MODEL.parent / "tiny-pythia-saes-k8", MODEL.parent / "tiny-pythia-saes-k32")
LAYERS = range(6)
ROWS = 400  # maximum rows per task
EVERY = 24  # one of this many tasks is timed with `sae-probes`


class Whole(NamedTuple):
    """A run of `main.py`."""

    seconds: float
    peak_gb: float


class Drawn(NamedTuple):
    """The rows that the run draws."""

    tasks: list[str]
    characters: dict[str, int]  # of each task


def measure(environment: Path, repeats: int) -> list[tables.Row]:
    """Return the table's rows, header first: medians of both sides, run in turn."""
    python = make_environment(environment)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory(prefix="delta-selectivity-") as work:
        everything = Path(work) / "all.csv"
        drawn = draw_rows("sae-probes", everything)
        timed = drawn.tasks[::EVERY]
        rows = Path(work) / "timed.csv"
        draw_rows(",".join(timed), rows)
        for i in range(repeats):
            ours.append(time_ours(Path(work) / f"results_{i}"))
            theirs.append(time_package(python, rows, timed, drawn))
    whole = statistics.median(run.seconds for run in ours)
    forward, probes = (statistics.median(side) for side in zip(*theirs, strict=True))
    return [
        ("", "timed", "forward, s", "probes, s", "whole job, s", "of ours", "peak memory, GB"),
        ("main.py", "whole", "", "", f"{whole:.0f}", "1.0x", f"{max(run.peak_gb for run in ours):.2f}"),
        (
            f"{PACKAGE}, hook by hook", f"{len(timed)} of {len(drawn.tasks)} tasks", f"{forward:.0f}", f"{probes:.0f}",
            f"{forward + probes:.0f}", f"{(forward + probes) / whole:.1f}x", "",
        ),
    ]  # fmt: skip


def draw_rows(tasks: str, path: Path) -> Drawn:
    """Write the rows that `main.py` draws of these tasks, and return their names and sizes."""
    program = [sys.executable, str(PROJECT / "datasets_wikidata.py")]
    flags = ["--datasets", tasks, "--shuffle_select_n", str(ROWS), "--export", str(path)]
    subprocess.run([*program, *flags], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    characters: dict[str, int] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            characters[row["dataset"]] = characters.get(row["dataset"], 0) + len(row["text"])
    return Drawn(list(characters), characters)


def time_ours(out: Path) -> Whole:
    """Run `main.py` on all tasks and layers, with its default statistics."""
    command = [sys.executable, str(PROJECT / "main.py"), "--sae_name", ",".join(map(str, SAES)), "--quiet"]
    command += ["--datasets", "sae-probes", "--shuffle_select_n", str(ROWS), "--output_directory", str(out)]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    return Whole(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)


def time_package(python: Path, rows: Path, timed: list[str], drawn: Drawn) -> tuple[float, float]:
    """Return the package's seconds for forward passes and for probes, scaled up to all tasks."""
    saes = ",".join([str(SAES[-1])] * len(SAES))  # the other is not in a format that the package reads
    seconds = run_driver([str(python), str(DRIVER), str(MODEL), saes], [*LAYERS], timed, "--rows", str(rows))
    longer = sum(drawn.characters.values()) / sum(drawn.characters[task] for task in timed)
    forward, probes = (sum(seconds[part].values()) for part in ("forward", "probes"))
    return forward * longer, probes * len(drawn.tasks) / len(timed)


def main() -> int:
    """Compare, or print the kept results."""
    flags = parser(__doc__)
    flags.add_argument("--environment", type=Path, help="folder of the package's environment; created if missing")
    args = flags.parse_args()
    if args.quick or args.cpu_time or (args.what == "run" and args.environment is None):
        flags.error("run needs --environment, and has neither a small size nor CPU time")
    print(show_or_measure("bench_suite", args, lambda: measure(args.environment, args.repeats)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
