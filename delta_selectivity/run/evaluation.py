"""Run a request from its plan to its last result file."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from delta_selectivity.records.sae_level import settle
from delta_selectivity.run.measure import measure
from delta_selectivity.run.planning import go_on, make_plan, missing_cells, open_files
from delta_selectivity.run.request import Request


def run_request(request: Request, progress: bool = False) -> list[Path]:
    """Measure what is missing of a request, and return its result files.

    Raises `RequestError` if the request is wrong, and whatever else stops the run; finished layers are on disk by then.
    """
    plan = go_on(make_plan(request))
    with ExitStack() as held:
        files = open_files(plan, held)
        measure(plan, files, missing_cells(plan, files), progress)
        settle(files)  # though nothing was missing: a run may have ended just before
    return list(dict.fromkeys(file.path for file in files.values()))
