"""Submit units to workers and collect their outcomes."""

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
    """Some units failed for reasons of their own; the others are measured and merged."""


def outcomes(client: Any, units: Sequence[Unit], home: Path, own_device: bool) -> Iterator[tuple[Unit, Outcome]]:
    """Each unit with its outcome, as they end, on whatever worker of `client` (a `distributed.Client`).

    own_device: each worker takes its own GPU if it has one; else the devices of the request.
    """
    from distributed import as_completed

    waiting = {
        client.submit(run_unit, unit, home, own_device, own_digest(), key=unit.id, pure=False, priority=-place): unit
        for place, unit in enumerate(units)
    }
    for future in as_completed(list(waiting), loop=client.loop):
        unit = waiting.pop(future)
        try:
            outcome = future.result()
        except Exception as error:  # it was lost with one worker after another, or a worker could not take it up
            outcome = Outcome("failed", f"{type(error).__name__}: {str(error)[:ERROR_SHOWN]}")
        yield unit, outcome


class OutcomeLog:
    """What units say, on this process's terminal, each line once; and whether all went well."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self.failed: list[str] = []

    def record(self, unit: Unit, outcome: Outcome) -> None:
        """Log a unit's warnings and its failure. Raises `RequestError` if it found the request wrong."""
        for line in outcome.warnings:
            if line not in self._told:
                self._told.add(line)
                log.warning("%s", line)
        if outcome.status == "refused":
            raise RequestError(outcome.line)
        if outcome.status == "failed":
            self.failed.append(outcome.line)
            log.warning("unit %s failed: %s", unit.id, outcome.line)
            log.info("where it failed: %s", outcome.trace)

    def conclude(self, n_units: int) -> None:
        """Raises `UnitsFailed` if some did."""
        if self.failed:
            raise UnitsFailed(f"{len(self.failed)} of {n_units} units; the first: {self.failed[0]}")
