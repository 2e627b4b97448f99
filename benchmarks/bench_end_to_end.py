"""Time the whole job on the bundled model, with one SAE per layer and the Wikidata tasks, and two other ways to do it.

python -m benchmarks.bench_end_to_end run --environment ~/sae-probes    # creates the environment if it is missing
python -m benchmarks.bench_end_to_end                                   # print the table of the kept results

`main.py` is timed as a whole, from its start to its last file, on the nine tasks and on three tasks of athletes' sports
that the others do not have. `sae-probes` 0.4.2 (in an environment of its own, offline) and a serial version
(`benchmarks/serial.py`) would take an hour, so a part of each is timed and scaled up. Of `sae-probes`, one of the nine
tasks is timed at the first and at the last hook; in between, a forward pass grows by one layer at a time. Of the serial
version, the last layer and one repeat are timed. Forward passes are scaled by rows, the probes of `sae-probes` by tasks
(each has 1024 training rows), and the fits of the serial version by rows and repeats. With --whole, `sae-probes` runs
all tasks and hooks. A round of all sides takes six minutes. The table has the medians of --repeats rounds.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import serial
from benchmarks.bundled import MODEL
from benchmarks.timing import parser, show_or_measure
from delta_selectivity.reporting import tables
from delta_selectivity.saes import LinearCoder, TopK, open_sae
from delta_selectivity.tasks.wikidata import load_wikidata

PROJECT = Path(__file__).resolve().parent.parent

SAE = MODEL.parent / "tiny-pythia-saes-k32"
PACKAGE = "sae-probes==0.4.2"
DRIVER = Path(__file__).resolve().with_name("sae_probes_driver.py")
ROWS = {  # the nine tasks that both measure, with rows as shipped
    "64_wikidata_occupation_isresearcher": 1960,  # the task that is timed
    "56_wikidatasex_or_gender": 5000,
    "57_wikidatais_alive": 5000,
    "58_wikidatapolitical_party": 3000,
    "59_wikidata_occupation_isjournalist": 2000,
    "60_wikidata_occupation_isathlete": 2000,
    "61_wikidata_occupation_isactor": 2000,
    "62_wikidata_occupation_ispolitician": 2000,
    "63_wikidata_occupation_issinger": 2000,
}
TASK = next(iter(ROWS))
REPEATS = 5  # main.py's default


@dataclass(frozen=True)
class Cost:
    """Seconds of the whole job on one side."""

    side: str
    timed: str  # the part that was timed
    forward: float | None  # model and SAE; None: main.py, whose stages overlap
    probes: float | None
    whole: float

    def row(self, ours: float) -> tables.Row:
        parts = ("" if seconds is None else f"{seconds:.0f}" for seconds in (self.forward, self.probes))
        return (self.side, self.timed, *parts, f"{self.whole:.0f}", f"{self.whole / ours:.1f}x")


def measure(environment: Path, whole: bool, cpu_time: bool, repeats: int) -> list[tables.Row]:
    """Return the rows of the table, header first: medians of all sides, run in turn."""
    rounds = [
        [time_ours(cpu_time), *time_package(environment, whole, cpu_time), time_serial(cpu_time)]
        for _ in range(repeats)
    ]
    costs = [median(side) for side in zip(*rounds, strict=True)]
    header = ("", "timed", "forward and SAE, s", "probes, s", "whole job, s", "of ours")
    return [header, *(cost.row(costs[0].whole) for cost in costs)]


def median(costs: Sequence[Cost]) -> Cost:
    """Return the medians of one side over several rounds, part by part."""
    first, wholes = costs[0], [cost.whole for cost in costs]
    forward, probes = (_median_of([getattr(cost, part) for cost in costs]) for part in ("forward", "probes"))
    return Cost(first.side, first.timed, forward, probes, statistics.median(wholes))


def _median_of(seconds: Sequence[float | None]) -> float | None:
    """Return the median; None if the side does not have this part."""
    found = [value for value in seconds if value is not None]
    return statistics.median(found) if found else None


def time_ours(cpu_time: bool) -> Cost:
    """Time `main.py` with all layers, tasks and defaults."""
    with tempfile.TemporaryDirectory(prefix="delta-selectivity-") as out:
        command = [
            sys.executable,
            str(PROJECT / "main.py"),
            "--sae_name",
            str(SAE),
            "--output_directory",
            out,
            "--quiet",
        ]
        clock = _cpu_of_children if cpu_time else time.perf_counter
        start = clock()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return Cost("main.py", "whole", None, None, clock() - start)


def _cpu_of_children() -> float:
    """Return the CPU seconds of the finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def time_package(environment: Path, whole: bool, cpu_time: bool) -> list[Cost]:
    """Time `sae-probes` as its README runs it, and with the activations of all hooks from one earlier pass."""
    driver = [str(make_environment(environment)), str(DRIVER), str(MODEL), str(SAE)]
    n_layers = _n_layers()
    layers = [*range(n_layers)] if whole else [0, n_layers - 1]
    tasks = [*ROWS] if whole else [TASK]
    clock = ["--cpu_time"] if cpu_time else []
    one_by_one = run_driver(driver, layers, tasks, *clock)
    together = run_driver(driver, [*range(n_layers)], tasks, "--at_its_best", "--forward_only", *clock)
    rows = sum(ROWS.values()) / sum(ROWS[task] for task in tasks)
    probes = statistics.fmean(one_by_one["probes"].values()) * n_layers * len(ROWS) / len(tasks)
    forward = statistics.fmean(one_by_one["forward"].values()) * n_layers * rows  # linear in the layer
    at_best = together["forward"]["all"] * rows
    timed = "whole" if whole else "1 task; first and last hook"
    timed_best = "whole" if whole else "1 task, all hooks"
    return [
        Cost(f"{PACKAGE}, hook by hook", timed, forward, probes, forward + probes),
        Cost(f"{PACKAGE}, all hooks in one pass", timed_best, at_best, probes, at_best + probes),
    ]


def time_serial(cpu_time: bool) -> Cost:
    """Time the last layer and one task with one repeat, and scale up to all layers, tasks and repeats."""
    n_layers = _n_layers()
    texts, labels, persons = _timed_task()
    clock = time.process_time if cpu_time else time.perf_counter
    found = serial.timed(MODEL, _weights(n_layers - 1), n_layers - 1, texts, labels, persons, clock)
    scale = n_layers * sum(ROWS.values()) / len(texts)
    forward, probes = found.forward_seconds * scale, found.probe_seconds * scale * REPEATS
    return Cost("serial version", "1 task, 1 layer, 1 repeat", forward, probes, forward + probes)


def make_environment(folder: Path) -> Path:
    """Return the interpreter of an environment with the package and our version of torch; create it if missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        wanted = [PACKAGE, f"torch=={torch.__version__.partition('+')[0]}"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
    return python


def run_driver(command: list[str], layers: list[int], tasks: list[str], *flags: str) -> dict[str, dict[str, float]]:
    """Run the driver with interpreter, model and SAE as in `command`; return the seconds that it prints."""
    where = ["--hooks", ",".join(map(str, layers)), "--tasks", ",".join(tasks)]
    done = subprocess.run(
        [*command, *where, *flags],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    seconds: dict[str, dict[str, float]] = json.loads(done.stdout)
    return seconds


def _n_layers() -> int:
    return int(json.loads((MODEL / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])


def _timed_task() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return texts, labels and people of the timed task, with rows as shipped."""
    row_sets = load_wikidata("occupation").row_sets
    (found,) = [row_set for row_set in row_sets if row_set.probes[0].name == "is_researcher"]
    people = [row.mention.person for row in found.rows]
    persons = np.unique(people, return_inverse=True)[1]
    return [row.mention.text for row in found.rows], np.array([row.value == "1" for row in found.rows]), persons


def _weights(layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    coder = open_sae(str(SAE)).load(layer, "cpu").coder
    assert isinstance(coder, LinearCoder) and isinstance(coder.selection, TopK)
    return coder.W_enc, coder.b_enc, coder.W_dec, coder.b_dec, coder.selection.k


def main() -> int:
    """Compare, or print the kept results."""
    flags = parser(__doc__)
    flags.add_argument("--environment", type=Path, help="folder of the package's environment; created if missing")
    flags.add_argument("--whole", action="store_true", help="run the package on all tasks and hooks: almost an hour")
    args = flags.parse_args()
    if args.quick or (args.what == "run" and args.environment is None):
        flags.error("run needs --environment, and has no small size")
    print(
        show_or_measure(
            "bench_end_to_end", args, lambda: measure(args.environment, args.whole, args.cpu_time, args.repeats)
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
