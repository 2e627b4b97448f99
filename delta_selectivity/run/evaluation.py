"""Run a request from its plan to its last result file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from delta_selectivity.records.sae_level import settle
from delta_selectivity.run.measure import measure
from delta_selectivity.run.planning import Cell, Plan, adopt_existing_choices, make_plan, missing_cells, open_files
from delta_selectivity.run.request import Request
from delta_selectivity.system.terminal import show_on_stderr


def run_request(request: Request, progress: bool = False) -> list[Path]:
    """Measure the missing results of a request, and return its result files.

    Raises `RequestError` if the request is wrong, and any other error that stops the run; finished layers stay on disk.
    """
    plan = adopt_existing_choices(make_plan(request))
    with ExitStack() as locks:
        files = open_files(plan, locks)
        cells = missing_cells(plan, files)
        if progress and cells:
            show_on_stderr(_summary(plan, cells))
        measure(plan, files, cells, progress)
        settle(files)  # even if nothing was missing: a run may have stopped just before this step
    return list(dict.fromkeys(file.path for file in files.values()))


def _summary(plan: Plan, cells: Sequence[Cell]) -> str:
    """Return a line that describes the run."""
    counts = {
        "text": len(plan.texts.mentions),
        "probe": sum(len(dataset.probes) for dataset in plan.texts.datasets),
        "SAE": len(plan.saes),
        "layer": len({cell.site.layer for cell in cells}),
    }
    shown = ", ".join(f"{n:,} {name}{'' if n == 1 else 's'}" for name, n in counts.items())
    return f"{shown}: loading {plan.info.name} on {plan.request.device1}"
