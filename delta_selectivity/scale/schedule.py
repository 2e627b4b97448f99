"""Submission of units to workers, and collection of their outcomes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.scale.same_program import own_digest
from delta_selectivity.scale.units import Unit
from delta_selectivity.scale.worker import ERROR_SHOWN, Outcome, run_unit

log = logging.getLogger(__name__)


class UnitsFailed(RuntimeError):
    """Some units failed; the others are measured and merged."""


def outcomes(client: Any, units: Sequence[Unit], cwd: Path, own_device: bool) -> Iterator[tuple[Unit, Outcome]]:
    """Yield each unit with its outcome as it finishes on a worker of `client` (a `distributed.Client`).

    own_device: whether each worker uses its own GPU if it has one; otherwise the devices of the request.
    """
    from distributed import as_completed

    waiting = {
        client.submit(run_unit, unit, cwd, own_device, own_digest(), key=unit.id, pure=False, priority=-place): unit
        for place, unit in enumerate(units)
    }
    for future in as_completed(list(waiting), loop=client.loop):
        unit = waiting.pop(future)
        try:
            outcome = future.result()
        except Exception as error:  # its workers were lost too often, or could not start it
            outcome = Outcome("failed", f"{type(error).__name__}: {str(error)[:ERROR_SHOWN]}")
        yield unit, outcome


class OutcomeLog:
    """Logs the warnings and failures of units, each line once, and collects the failures."""

    def __init__(self) -> None:
        self._logged: set[str] = set()
        self.failed: list[str] = []

    def record(self, unit: Unit, outcome: Outcome) -> None:
        """Log a unit's warnings and its failure. Raises `RequestError` if the unit was refused."""
        for line in outcome.warnings:
            if line not in self._logged:
                self._logged.add(line)
                log.warning("%s", line)
        if outcome.status == "refused":
            raise RequestError(outcome.line)
        if outcome.status == "failed":
            self.failed.append(outcome.line)
            log.warning("unit %s failed: %s", unit.id, outcome.line)
            log.info("traceback: %s", outcome.trace)

    def conclude(self, n_units: int) -> None:
        """Raise `UnitsFailed` if any unit failed."""
        if self.failed:
            raise UnitsFailed(f"{len(self.failed)} of {n_units} units; the first: {self.failed[0]}")
