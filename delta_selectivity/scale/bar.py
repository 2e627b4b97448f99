"""The progress bar of many workers."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from delta_selectivity.scale.units import Unit
from delta_selectivity.system.bars import open_bar


class UnitsBar:
    """One bar for the probes of all workers, with the number of finished units; silent if `quiet`."""

    def __init__(self, units: Sequence[Unit], quiet: bool) -> None:
        self._n_units, self._n_done = len(units), 0
        total = sum(unit.n_probes for unit in units)
        self._bar = open_bar(total, "probes", "probe", quiet=quiet)
        self._bar.set_postfix_str(f"0 of {self._n_units} units")

    def add(self, unit: Unit) -> None:
        """Count a unit that finished or failed."""
        self._n_done += 1
        self._bar.set_postfix_str(f"{self._n_done} of {self._n_units} units", refresh=False)
        self._bar.update(unit.n_probes)

    def __enter__(self) -> UnitsBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
