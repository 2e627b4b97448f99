"""Measure how time and memory of `main.py` grow with rows, layers, SAEs and probes, and run a job larger than memory.

python -m benchmarks.bench_scaling run             # the bundled model on rows of the Wikidata texts: minutes
python -m benchmarks.bench_scaling                 # print the table of the kept results
python -m benchmarks.bench_scaling --large         # 200,000 rows x 12 layers x 768: an hour or more, 15 GB of disk

Each cell is a run in a process of its own. Seconds are those of its stages, summed over threads, without start-up and
loading of weights; memory is the process's peak. The exponent is fitted to the stages that depend on the quantity:
forward passes and SAEs for layers and SAEs, all stages for rows, probes and statistics for probes.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import large_job
from benchmarks.bundled import MODEL
from benchmarks.timing import exponent, parser, show_or_measure
from delta_selectivity.reporting import tables
from delta_selectivity.tasks import load_probe_texts

PROJECT = Path(__file__).resolve().parent.parent

SAE = MODEL.parent / "tiny-pythia-saes-k32"
STAGES = ("forward", "sae", "probes", "statistics")


@dataclass(frozen=True)
class Job:
    """A request to `main.py`."""

    rows: int
    layers: int
    saes: int
    probes: int  # one per class of the labels (a class against the rest); two classes make one probe


@dataclass(frozen=True)
class Cost:
    """Time and memory of a job."""

    seconds: dict[str, float]  # by stage, summed over threads
    peak_gb: float

    def of(self, stages: Sequence[str]) -> float:
        """Return the seconds of these stages."""
        return sum(self.seconds[stage] for stage in stages)


@dataclass(frozen=True)
class Doubling:
    """One quantity that is doubled while the others are constant."""

    quantity: str
    base: Job
    sizes: tuple[int, ...]
    stages: tuple[str, ...]  # stages that depend on the quantity

    def jobs(self) -> Iterator[tuple[int, Job]]:
        for size in self.sizes:
            yield size, Job(**{**vars(self.base), self.quantity: size})


def doublings(quick: bool) -> list[Doubling]:
    """Return sizes that take a few minutes in total; with `quick`, a few seconds."""
    if quick:
        return [Doubling("rows", Job(100, 1, 1, 1), (100, 200), STAGES)]
    return [
        Doubling("rows", Job(1000, 2, 1, 1), (1000, 2000, 4000), STAGES),
        Doubling("layers", Job(1000, 1, 1, 1), (1, 2, 4), ("forward", "sae")),
        Doubling("saes", Job(1000, 1, 1, 1), (1, 2, 4, 8), ("forward", "sae")),
        Doubling("probes", Job(2000, 1, 1, 4), (4, 8, 16), ("probes", "statistics")),
    ]


def measure(quick: bool) -> list[tables.Row]:
    """Return the rows of the table, header first."""
    rows: list[tables.Row] = [("", "size", *(f"{stage}, s" for stage in STAGES), "peak memory, GB", "exponent", "of")]
    for doubling in doublings(quick):
        costs = {size: run_job(job) for size, job in doubling.jobs()}
        fitted = exponent(list(costs), [cost.of(doubling.stages) for cost in costs.values()])
        for place, (size, cost) in enumerate(costs.items()):
            last = place == len(costs) - 1
            stages = [f"{cost.seconds[stage]:.1f}" for stage in STAGES]
            found = (f"{fitted:.2f}", " + ".join(doubling.stages)) if last else ("", "")
            rows.append((doubling.quantity, f"{size:,}", *stages, f"{cost.peak_gb:.2f}", *found))
    return rows


def run_job(job: Job) -> Cost:
    """Run a job in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="delta-selectivity-") as name:
        folder = Path(name)
        write_rows(folder / "rows.csv", job.rows, job.probes)
        saes = [folder / f"sae{i}" for i in range(job.saes)]
        for copy in saes:
            shutil.copytree(SAE, copy)
        out = folder / "out"
        command = [
            sys.executable, str(PROJECT / "main.py"), "--quiet", "--model_name", str(MODEL),
            "--sae_name", ",".join(map(str, saes)), "--dataset_file", str(folder / "rows.csv"),
            "--layers", f"0-{job.layers - 1}", "--output_directory", str(out),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        runs = [json.loads(path.read_text(encoding="utf-8"))["_run"] for path in out.rglob("*_rows.json")]
        last = max(runs, key=lambda run: sum(run["seconds"].get(stage, 0) for stage in STAGES))
        return Cost({stage: last["seconds"].get(stage, 0.0) for stage in STAGES}, last["resources"]["peak_ram_gb"])


def write_rows(path: Path, n_rows: int, n_probes: int) -> None:
    """Write a user's task: texts of the Wikidata tasks with random labels."""
    mentions = load_probe_texts().mentions
    random = np.random.default_rng(0)
    chosen = random.permutation(len(mentions))[:n_rows]
    labels = random.integers(max(n_probes, 2), size=n_rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("text", "label", "group", "start", "end"))
        for place, label in zip(chosen, labels, strict=True):
            mention = mentions[place]
            table.writerow((mention.text, f"class {label}", mention.person, mention.start, mention.end))


def main() -> int:
    """Measure, or print the kept results."""
    flags = parser(__doc__)
    flags.add_argument("--large", action="store_true", help="rows that do not fit in memory, in a process of their own")
    flags.add_argument("--rows", type=int, default=200_000, help="of --large")
    flags.add_argument("--layers", type=int, default=12, help="of --large")
    flags.add_argument("--memory_gb", type=float, default=8.0, help="of --large: memory limit")
    args = flags.parse_args()
    if args.large:
        found = large_job.run(args.rows, args.layers, width=64 if args.quick else 768)
        print(tables.aligned(large_job.table(found, args.memory_gb)))
        return int(found.peak_gb > args.memory_gb)
    print(show_or_measure("bench_scaling", args, lambda: measure(args.quick)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
