"""Time several sides in turn, fit exponents, and keep tables for documents, for the benchmarks in this folder.

seconds = in_turn({"ours": fit, "theirs": their_fit}, repeats=5)     # medians, in seconds
python -m benchmarks.bench_forward run                               # measure, print, keep
python -m benchmarks.bench_forward                                   # print the kept results
"""

from __future__ import annotations

import argparse
import compileall
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from delta_selectivity.reporting import tables
from delta_selectivity.system import processor
from delta_selectivity.system.whole_file import replacing

KEPT = Path(__file__).resolve().parent  # a file for each benchmark


Clock = Callable[[], float]
"""`time.perf_counter`, or, on a machine with other load, `time.process_time`: CPU seconds of all threads."""


def in_turn(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    synchronise: Callable[[], object] = lambda: None,
    clock: Clock = time.perf_counter,
) -> dict[str, float]:
    """Return the median seconds of each side. The sides are run in turn, so that other load affects all alike.

    Each is run once before, untimed. `synchronise` waits for a device that works asynchronously.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, work in sides.items():
            synchronise()
            start = clock()
            work()
            synchronise()
            if turn > 0:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def in_threads(work: Callable[[], object], workers: int) -> Callable[[], None]:
    """Run `work` in this many threads at the same time, as the producer does with its batches."""

    def run() -> None:
        with ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(work) for _ in range(workers)]:
                done.result()

    return run


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the least-squares slope of log cost over log size: 1 if cost is proportional to size."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    return statistics.linear_regression(x, y).slope


def kept_file(benchmark: str) -> Path:
    """Return the file with the rows of a benchmark's table."""
    return KEPT / f"{benchmark}.json"


def machine() -> str:
    """Describe this processor, which kernels are fast on it, and any limit on the instructions that torch may use."""
    held = torch.backends.cpu.get_cpu_capability()
    limited = held == "AVX2" and bool(torch.cpu.get_capabilities().get("avx512_f"))
    return f"{processor.describe()}{f', held to {held}' if limited else ''}"


def keep(benchmark: str, rows: Sequence[tables.Row]) -> None:
    """Write a table's rows, header first, into the repository; replace those of this machine, keep those of others."""
    content = kept(benchmark) if kept_file(benchmark).exists() else {}
    with replacing(kept_file(benchmark), "w", encoding="utf-8") as file:
        json.dump({**content, machine(): rows}, file, indent=0, ensure_ascii=False)
        file.write("\n")


def kept(benchmark: str) -> dict[str, list[tables.Row]]:
    """Return the rows that `keep` wrote last, by machine."""
    found = json.loads(kept_file(benchmark).read_text(encoding="utf-8"))
    return {name: [tuple(row) for row in rows] for name, rows in found.items()}


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with `run`, `--quick`, `--repeats` and `--cpu_time`; benchmarks add their own flags."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "what", nargs="?", choices=["run"], help="measure, print and keep; otherwise print the kept results"
    )
    made.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs; nothing is kept")
    made.add_argument("--repeats", type=int, default=3, help="timed runs of each side")
    made.add_argument("--cpu_time", action="store_true", help="CPU seconds, for a machine with other load")
    return made


def show_or_measure(benchmark: str, args: argparse.Namespace, measure: Callable[[], list[tables.Row]]) -> str:
    """Return the requested table: measured now, or as it was kept, one for each machine."""
    if args.what != "run" and not args.quick:
        if not kept_file(benchmark).exists():
            raise SystemExit(f"{benchmark}: there are no kept results: measure them with `run`")
        return "\n\n".join(f"{name}\n\n{tables.aligned(rows)}" for name, rows in kept(benchmark).items())
    _compile_modules()
    rows = measure()
    if not args.quick:
        keep(benchmark, rows)
    return tables.aligned(rows)


def _compile_modules() -> None:
    """Compile the modules of this project, as the first run of a program does and pip does for other packages.

    Where the environment forbids it, every start would compile all of them again, which takes a second.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    compileall.compile_dir(KEPT.parent / "delta_selectivity", quiet=1)
