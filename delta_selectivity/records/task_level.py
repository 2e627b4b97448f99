"""Suite scores: means over tasks, with both tasks and people treated as random samples.

    over_tasks({"us_state": [[cell, cell], [cell]], "gender": [[cell]]})     # source -> its tasks' cells
    levels(cells, tasks)                                                     # in plain numbers, by family too

All tasks have equal weight. Tasks from one file (`source`) tend to agree, so the source is the sampling unit. The
mean's squared error is that due to people (`estimate_mean`) plus the additional variance between sources (the moment
estimator of a random effect: Cochran 1954, DerSimonian & Laird 1986; unweighted, since tasks have equal weight).
Intervals use Student's t (Hartung & Knapp 2001), with Satterthwaite's degrees of freedom.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.probing.uncertainty import Cell, Estimate, estimate_mean
from delta_selectivity.records.result_file import Json

T = TypeVar("T")
Place = tuple[str, int, str]  # result file's name, layer, probe


class TaskOfFile(NamedTuple):
    """The task of a result file."""

    family: str | None  # group of similar tasks; None for a user's own task
    source: str  # shared by tasks on the same rows


def task_of(run: Mapping[str, Any], name: str) -> TaskOfFile:
    """Return the task in `_run` of a result file; the default source is the file's own name."""
    task = run.get("task") or {}
    return TaskOfFile(task.get("family"), task.get("source") or name)


@dataclass(frozen=True)
class OverTasks:
    """A mean over tasks with equal weights."""

    estimate: Estimate | None  # with tasks and people as random samples; None for a single source
    value: float
    spread: float | None  # standard deviation of the true values of sources
    n_tasks: int
    n_sources: int


def over_tasks(sources: Mapping[str, Sequence[Sequence[Cell]]]) -> OverTasks:
    """Return the mean over tasks of their cells' mean change.

    sources: Source -> its tasks, each a list of one or more measured cells. All cells have the same number of repeats
    and folds.
    """
    tasks = [cells for tasks_of_source in sources.values() for cells in tasks_of_source]
    people = _mean(tasks)
    if len(sources) < 2:
        return OverTasks(None, people.value, None, len(tasks), len(sources))
    means = [_mean(cells) for cells in sources.values()]
    weight = np.array([len(cells) for cells in sources.values()]) / len(tasks)
    value = np.array([mean.value for mean in means])
    error = np.array([mean.standard_error for mean in means])
    squares = weight**2
    between, between_freedom = _between(value, weight)  # including the part due to people
    shared = people.standard_error**2 - float(squares @ error**2)  # covariance from people shared by sources
    variance = max(between + shared, people.standard_error**2)
    uncertain = between**2 / between_freedom + shared**2 / people.degrees_of_freedom
    freedom = max(1.0, variance**2 / uncertain) if uncertain else people.degrees_of_freedom
    spread = math.sqrt((variance - people.standard_error**2) / squares.sum())
    return OverTasks(
        Estimate(people.value, math.sqrt(variance), freedom), people.value, spread, len(tasks), len(sources)
    )


def _between(value: NDArray[np.float64], weight: NDArray[np.float64]) -> tuple[float, float]:
    """Return the squared error of the weighted mean from the spread of the values, and its degrees of freedom.

    Unbiased if the values have equal variance: the squares are value' M value, with expectation variance * trace(M).
    The degrees of freedom are 2 * expectation^2 / variance of that form (Satterthwaite).
    """
    distance = np.eye(len(weight)) - weight  # value - mean = distance @ value
    form = distance.T @ np.diag(weight**2) @ distance
    trace = np.trace(form)
    error = float(value @ form @ value * (weight @ weight) / trace)
    return error, float(trace**2 / np.trace(form @ form))


def _mean(tasks: Sequence[Sequence[Cell]]) -> Estimate:
    """Return the mean over tasks, with people as the sample.

    `estimate_mean` gives all cells the same weight, so each cell is scaled by the number of cells of its task.
    """
    n_cells = sum(map(len, tasks))
    factors = [n_cells / (len(tasks) * len(cells)) for cells in tasks]
    return estimate_mean(
        [
            cell if factor == 1 else dataclasses.replace(cell, change=cell.change * np.float64(factor))
            for cells, factor in zip(tasks, factors, strict=True)
            for cell in cells
        ]
    )


def levels(
    scores: Mapping[str, Mapping[Place, Cell]], tasks: Mapping[str, TaskOfFile], by_family: bool = True
) -> Json | None:
    """Return the means over tasks of each score, and by family if there are several; None for a single task.

    scores: Name of a score -> its cells. tasks: By the first part of each place.
    """
    by_score = {name: _by_task(cells) for name, cells in scores.items()}
    measured = {file for by_task in by_score.values() for file in by_task}
    if len(measured) < 2:
        return None
    level = _level(by_score, tasks, measured)
    named = {tasks[file].family for file in measured}
    families = sorted(family for family in named if family is not None and len(named) > 1)
    files_of = {family: {file for file in measured if tasks[file].family == family} for family in families}
    return (
        {**level, "families": {name: _level(by_score, tasks, files_of[name]) for name in families}}
        if by_family
        else level
    )


def _level(
    scores: Mapping[str, Mapping[str, Sequence[Cell]]], tasks: Mapping[str, TaskOfFile], files: set[str]
) -> Json:
    """Return the numbers of these tasks; None if not measured, or for the interval of a single source."""
    level: Json = {"n_tasks": len(files), "n_sources": len({tasks[file].source for file in files})}
    for name, by_task in scores.items():
        sources: dict[str, list[Sequence[Cell]]] = {}
        for file in sorted(files & by_task.keys()):
            sources.setdefault(tasks[file].source, []).append(by_task[file])
        over = over_tasks(sources) if sources else None
        estimate = over and over.estimate
        level |= {
            name: over and over.value,
            f"{name}_ci_low": estimate and estimate.low,
            f"{name}_ci_high": estimate and estimate.high,
            f"{name}_spread": over and over.spread,
        }
    return level


def _by_task(cells: Mapping[Place, T]) -> dict[str, list[T]]:
    tasks: dict[str, list[T]] = {}
    for (file, _, _), cell in cells.items():
        tasks.setdefault(file, []).append(cell)
    return tasks
