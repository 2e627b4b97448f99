#!/usr/bin/env python3
"""The numbers of main.py by many workers: processes on this machine, one a GPU, or a Dask cluster.

    python compute_selectivity.py --workers 2                       # the bundled demo on two processes
    python compute_selectivity.py --plan                            # the units, their bytes and seconds; nothing runs
    python compute_selectivity.py --scheduler tcp://10.0.0.7:8786 --model_name ... --sae_name ...
    python compute_selectivity.py --config sweep.toml               # many requests, one after another or side by side

All flags of main.py are known here, and mean the same. The request is cut into units (a group of layers and a group of
SAEs, see `scale.units`), each unit is an ordinary run of main's own code in some worker, and what a unit found is
merged into the very files that main.py would have written. Either program goes on where the other was stopped. Exit
codes are those of main.py.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take a tenth of a second
    import interrupts

    interrupts.leave_at_once()

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import main as program
from command_line import build_parser, parse_config
from config import RunConfig
from errors import RequestError
from interrupts import leave
from terminal import show

if TYPE_CHECKING:
    from planning import Plan
    from scale.merge import Files
    from scale.units import Unit

log = logging.getLogger("delta_selectivity")


@dataclass(frozen=True)
class Job:
    """One request, found to be possible, and its units."""

    config: RunConfig
    plan: Plan
    units: list[Unit]


def flags_of_many_workers() -> argparse.ArgumentParser:
    """The flags that main.py has not."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add = parser.add_argument_group("many workers").add_argument
    add("--workers", type=int, help="processes on this machine (one a GPU; without GPUs, one a core)")
    add("--scheduler", metavar="ADDRESS", help="of a running Dask scheduler, such as tcp://10.0.0.7:8786, whose "
        "workers see this folder and the models under the same paths (processes on this machine)")  # fmt: skip
    add("--layers_per_unit", type=int, default=1, help="layers that a worker takes at a time (%(default)s)")
    add("--saes_per_unit", type=int, default=8, help="SAEs that a worker takes at a time: they share the forward pass "
        "and the probes of the model's own activations (%(default)s)")  # fmt: skip
    add("--plan", action="store_true", help="print the units with estimated bytes and seconds, and end")
    add("--config", type=Path, metavar="SWEEP.toml", help="several requests, as docs/scale.md says; further flags "
        "hold for all of them")  # fmt: skip
    return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and main.py's. Raises `RequestError`."""
    own = flags_of_many_workers()
    if {"-h", "--help"} & set(argv):
        argparse.ArgumentParser(
            prog="compute_selectivity.py",
            description="The numbers of main.py by many workers.",
            parents=[build_parser(), own],
            conflict_handler="resolve",
        ).parse_args(["--help"])
    try:
        asked, others = own.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise RequestError(f"{error} (see --help)") from error
    for flag in ("workers", "layers_per_unit", "saes_per_unit"):
        value = getattr(asked, flag)
        if value is not None and value < 1:
            raise RequestError(f"--{flag} must be at least 1, got {value}")
    if asked.scheduler is not None and asked.workers is not None:
        raise RequestError(f"--workers {asked.workers}: a cluster of its own (--scheduler) has the workers it has")
    return asked, others


def check(argv: Sequence[str], asked: argparse.Namespace) -> Job:
    """What one request takes, by configs alone. Raises `RequestError` if it is wrong."""
    from planning import make_plan
    from scale.units import plan_units

    config, task = parse_config(argv)
    if task != "measure":
        raise RequestError(f"{task} is not spread over workers: python main.py does that")
    plan = make_plan(config, fetch=False)
    return Job(config, plan, plan_units(config, plan, asked.layers_per_unit, asked.saes_per_unit))


def compute(argv: Sequence[str]) -> None:
    """All of it. Raises `RequestError` if a request is wrong, anything else if units failed."""
    asked, others = parse(argv)
    sweep = None
    requests = [others]
    if asked.config is not None:
        from sweep import Sweep

        sweep = Sweep.read(asked.config)
        requests = [[*request, *others] for request in sweep.requests]
    jobs = [check(request, asked) for request in requests]
    config = jobs[0].config
    logging.getLogger().setLevel(logging.INFO if config.verbose else logging.WARNING)
    if asked.plan:
        from scale.estimate import render

        show("\n\n".join(render(job.config, job.plan, job.units) for job in jobs))
        return
    paths = measure(jobs, asked, any(word.startswith("--device") for word in argv))
    if sweep is not None:
        sweep.conclude(paths, config.quiet)
    elif not config.quiet:
        import report

        show(report.render(report.load(paths[0])))


def measure(jobs: Sequence[Job], asked: argparse.Namespace, devices_asked: bool) -> list[list[Path]]:
    """Measure what is missing of all jobs, and settle them; the result files of each."""
    from planning import open_files
    from sae_level import settle

    with ExitStack() as held:
        opened = [(job, open_files(job.config, job.plan, held)) for job in jobs]
        todo: list[tuple[Unit, Files]] = []
        for job, files in opened:
            if job.config.overwrite:
                clear(job.units)
            missing = missing_results(job, files)
            todo += [(unit, files) for unit in job.units if missing & unit.subjects]
        if todo:
            spread(todo, asked, jobs[0].config, devices_asked)
        else:
            log.warning("everything asked for is on disk already")
        for job, files in opened:
            settle(files)
            clear(job.units)
    return [list(dict.fromkeys(file.path for file in files.values())) for _, files in opened]


def missing_results(job: Job, files: Files) -> set[tuple[int, int]]:
    """(SAE or baseline, layer) of which a dataset's result is not on disk."""
    from planning import missing_work

    missing = missing_work(job.plan, dict(files))
    return {(sae_id, site.layer) for sites in missing.values() for site, ids in sites.items() for sae_id in ids}


def spread(
    todo: Sequence[tuple[Unit, Files]], asked: argparse.Namespace, config: RunConfig, devices_asked: bool
) -> None:
    """Have workers measure these units, and merge each as it ends."""
    from scale.bar import UnitsBar
    from scale.cluster import open_cluster
    from scale.merge import merge
    from scale.schedule import Telling, outcomes

    n_workers, gpus = count_workers(asked.workers, config, len(todo))
    files_of = {unit.folder: files for unit, files in todo}
    units, telling = [unit for unit, _ in todo], Telling()
    with (
        open_cluster(n_workers, gpus, asked.scheduler) as client,
        UnitsBar(units, config.quiet) as bar,
    ):
        own_device = bool(gpus) or (asked.scheduler is not None and not devices_asked)
        for unit, outcome in outcomes(client, units, Path.cwd(), own_device):
            telling.hear(unit, outcome)
            if outcome.status == "done":
                merge(unit.folder, files_of[unit.folder])
                clear([unit])
            bar.ended(unit)
    telling.conclude(len(units))


def count_workers(asked: int | None, config: RunConfig, n_units: int) -> tuple[int, int]:
    """Processes on this machine, and how many of them have a GPU of their own: all or none."""
    gpus = 0
    if config.device1 != "cpu":
        import torch

        gpus = torch.cuda.device_count()
    if gpus and asked is not None and asked > gpus:
        raise RequestError(f"--workers {asked}: this machine has {gpus} GPUs, for one worker each")
    n_workers = min(asked or gpus or len(os.sched_getaffinity(0)), n_units)
    return n_workers, n_workers if gpus else 0


def clear(units: Sequence[Unit]) -> None:
    """Remove the folders of units; what else is beside them belongs to another run."""
    for unit in units:
        shutil.rmtree(unit.folder, ignore_errors=True)
        with suppress(OSError):  # not empty, or gone
            unit.folder.parent.rmdir()


if __name__ == "__main__":
    from multiprocessing import util

    code = program.main(sys.argv[1:], compute)
    util._exit_function()  # type: ignore[attr-defined]  # what `leave` leaves out: else a tracker of queues complains
    leave(code)
