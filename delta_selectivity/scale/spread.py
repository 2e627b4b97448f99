"""Jobs over workers: units of what is missing, their outcomes merged as they come, and all files settled."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from delta_selectivity.errors import RequestError
from delta_selectivity.records.sae_level import settle
from delta_selectivity.run.planning import Plan, missing_work, open_files
from delta_selectivity.scale.bar import UnitsBar
from delta_selectivity.scale.cluster import open_cluster
from delta_selectivity.scale.merge import Files, merge
from delta_selectivity.scale.schedule import Telling, outcomes
from delta_selectivity.scale.units import Unit
from delta_selectivity.settings import RunConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One request, found to be possible, and its units."""

    config: RunConfig
    plan: Plan
    units: list[Unit]


def measure(jobs: Sequence[Job], asked: argparse.Namespace, devices_asked: bool) -> list[list[Path]]:
    """Measure what is missing of all jobs, and settle them; the result files of each."""
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
    missing = missing_work(job.plan, dict(files))
    return {(sae_id, site.layer) for sites in missing.values() for site, ids in sites.items() for sae_id in ids}


def spread(
    todo: Sequence[tuple[Unit, Files]], asked: argparse.Namespace, config: RunConfig, devices_asked: bool
) -> None:
    """Have workers measure these units, and merge each as it ends."""
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
        gpus = torch.cuda.device_count()
    if gpus and asked is not None and asked > gpus:
        raise RequestError(f"`workers` {asked}: this machine has {gpus} GPUs, for one worker each")
    n_workers = min(asked or gpus or len(os.sched_getaffinity(0)), n_units)
    return n_workers, n_workers if gpus else 0


def clear(units: Sequence[Unit]) -> None:
    """Remove the folders of units; what else is beside them belongs to another run."""
    for unit in units:
        shutil.rmtree(unit.folder, ignore_errors=True)
        with suppress(OSError):  # not empty, or gone
            unit.folder.parent.rmdir()
