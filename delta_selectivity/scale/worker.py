"""Measurement of one unit in a worker process.

    outcome = run_unit(unit, cwd, own_device=False, program=own_digest())

Errors are returned in the outcome, because Dask would retry a unit that raises. Dask does retry a unit whose worker is
lost; its folder then holds the finished part.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from delta_selectivity.errors import RequestError
from delta_selectivity.run.measure import measure
from delta_selectivity.run.planning import make_plan, missing_cells, open_files
from delta_selectivity.scale.same_program import other_source, own_digest
from delta_selectivity.scale.units import Unit
from delta_selectivity.system.file_lock import Locked, exclusive

ERROR_SHOWN = 400  # maximum characters of an error message: torch appends its C++ stack
LOCK_RETRY = 1.0  # seconds between attempts to lock a unit
LOCK_ATTEMPTS = 600  # before the unit fails, because the other process may hang

_one_at_a_time = threading.Lock()  # for workers with several threads: torch's thread count is per process


@dataclass(frozen=True)
class Outcome:
    """The result of running a unit."""

    status: Literal["done", "refused", "failed"]  # refused: the request is wrong
    line: str = ""  # the error message
    trace: str = ""  # the traceback
    warnings: tuple[str, ...] = ()  # logged while the unit ran
    process: int = 0  # id of the worker's process; 0 if it was lost
    seconds: float = 0.0  # duration


def run_unit(unit: Unit, cwd: Path, own_device: bool, program: str) -> Outcome:
    """Measure the missing results of a unit.

    Args:
        unit: what to measure.
        cwd: the folder that relative paths refer to.
        own_device: whether to use this worker's GPU, or the CPU if it has none; otherwise the devices of the request.
        program: `own_digest` of the submitting process; a worker that joined late may run other code.
    """
    if program != own_digest():
        return Outcome("refused", other_source(f"a worker on {platform.node()}"))
    os.chdir(cwd)
    if own_device:
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        unit = replace(unit, request=replace(unit.request, device1=device, device2=device))
    with _one_at_a_time, _collect_warnings() as warnings:
        start = time.perf_counter()
        outcome = _outcome_of(unit)
        seconds = time.perf_counter() - start
        return replace(outcome, warnings=tuple(warnings), process=os.getpid(), seconds=seconds)


def _outcome_of(unit: Unit) -> Outcome:
    try:
        _measure(unit)
    except RequestError as error:
        return Outcome("refused", str(error))
    except Exception as error:
        return Outcome("failed", f"{type(error).__name__}: {str(error)[:ERROR_SHOWN]}", traceback.format_exc())
    return Outcome("done")


def _measure(unit: Unit) -> None:
    unit.folder.mkdir(parents=True, exist_ok=True)
    with _unit_lock(unit.folder), ExitStack() as locks:
        decided = {name: getattr(unit, name) for name in ("prepend_bos", "dtype", "whole_tokens")}
        plan = replace(make_plan(unit.request, labels=unit.labels), **decided)
        files = open_files(plan, locks)
        cells = missing_cells(plan, files)
        of_unit = [cell for cell in cells if (plan.subjects[cell.subject].name, cell.site) in unit.places]
        if of_unit:
            measure(plan, files, of_unit)


@contextmanager
def _unit_lock(folder: Path) -> Iterator[None]:
    """Lock the unit; wait if another process has it, because a worker that counts as lost may still run."""
    with ExitStack() as lock:
        for _ in range(LOCK_ATTEMPTS):
            try:
                lock.enter_context(exclusive(folder / "unit"))
                break
            except Locked:
                time.sleep(LOCK_RETRY)
        else:
            raise TimeoutError(f"another process has locked {folder} for {LOCK_ATTEMPTS * LOCK_RETRY:.0f} s: end it")
        yield


@contextmanager
def _collect_warnings() -> Iterator[Mapping[str, None]]:
    """Collect logged warnings, each once and in order, to be shown by the submitting process."""
    collected: dict[str, None] = {}

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            collected[record.getMessage()] = None

    collector = Collector(logging.WARNING)
    collector.addFilter(lambda record: not record.name.startswith("distributed"))
    logging.captureWarnings(True)
    logging.getLogger().addHandler(collector)
    try:
        yield collected
    finally:
        logging.getLogger().removeHandler(collector)
