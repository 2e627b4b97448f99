"""Measurement of requests by many workers, with merging and completion of the results."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from delta_selectivity.errors import RequestError
from delta_selectivity.records.sae_level import settle
from delta_selectivity.run.planning import Files, Plan, missing_cells, open_files
from delta_selectivity.scale.bar import UnitsBar
from delta_selectivity.scale.cluster import Remote, open_cluster
from delta_selectivity.scale.merge import merge
from delta_selectivity.scale.schedule import OutcomeLog, outcomes
from delta_selectivity.scale.units import FOLDER, Unit
from delta_selectivity.system.processor import cpu_count
from delta_selectivity.system.terminal import NOTE
from delta_selectivity.system.whole_file import refuse_link

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A validated request and its units."""

    plan: Plan  # of the request
    units: list[Unit]


@dataclass(frozen=True)
class Workers:
    """The workers to use."""

    number: int | None  # of processes on this machine; None: one per GPU, or without GPUs one per core
    scheduler: Remote | None  # a running Dask scheduler; None: processes on this machine
    own_devices: bool  # whether each uses its own GPU if it has one; else the devices of the request
    quiet: bool  # no progress bar


def measure(jobs: Sequence[Job], workers: Workers) -> list[list[Path]]:
    """Measure the missing results of all jobs and complete their files; return the result files of each job."""
    with ExitStack() as locks:
        opened = [(job, open_files(job.plan, locks)) for job in jobs]
        todo: list[tuple[Unit, Files]] = []
        for job, files in opened:
            refuse_link(job.plan.request.output / FOLDER)
            if job.plan.request.settings.overwrite:
                clear(job.units)
            missing = {(cell.subject, cell.site.layer) for cell in missing_cells(job.plan, files)}
            todo += [(unit, files) for unit in job.units if missing & unit.subjects]
        if todo:
            run_units(todo, workers, jobs[0].plan.request.device1)
        else:
            log.log(NOTE, "all requested results are on disk already")
        for job, files in opened:
            settle(files)
            clear(job.units)
    return [list(dict.fromkeys(file.path for file in files.values())) for _, files in opened]


def run_units(todo: Sequence[tuple[Unit, Files]], workers: Workers, device: str) -> None:
    """Measure units on workers, and merge each one as it finishes."""
    n_workers, gpus = count_workers(workers.number, device, len(todo))
    files_of = {unit.folder: files for unit, files in todo}
    units, outcome_log = [unit for unit, _ in todo], OutcomeLog()
    with (
        open_cluster(n_workers, gpus, workers.scheduler) as client,
        UnitsBar(units, workers.quiet) as bar,
    ):
        for unit, outcome in outcomes(client, units, Path.cwd(), bool(gpus) or workers.own_devices):
            outcome_log.record(unit, outcome)
            if outcome.status == "done":
                merge(unit.folder, files_of[unit.folder])
                clear([unit])
            bar.add(unit)
    outcome_log.conclude(len(units))


def count_workers(requested: int | None, device: str, n_units: int) -> tuple[int, int]:
    """Return the number of processes on this machine, and how many of them have their own GPU: all or none."""
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if gpus and requested is not None and requested > gpus:
        raise RequestError(f"`workers` {requested}: this machine has {gpus} GPUs, and each worker needs one")
    n_workers = min(requested or gpus or cpu_count(), n_units)
    return n_workers, n_workers if gpus else 0


def clear(units: Sequence[Unit]) -> None:
    """Remove the folders of units; other folders next to them belong to other runs."""
    for unit in units:
        shutil.rmtree(unit.folder, ignore_errors=True)
        with suppress(OSError):  # not empty, or already removed
            unit.folder.parent.rmdir()
