"""The rows of the validation report: measured and required figures, and whether they agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from delta_selectivity.reporting import tables

HEADER: tables.Row = ("where", "plant", "figure", "measured", "required", "verdict")
VERDICTS = {True: "pass", False: "FAIL", None: ""}


@dataclass(frozen=True)
class Row:
    """One figure. `passed` is None for a figure that is reported but not judged."""

    where: str  # the world or the setting in which it was measured
    plant: str
    figure: str
    measured: str
    required: str = ""
    passed: bool | None = None


def judged(
    where: str,
    plant: str,
    figure: str,
    measured: float,
    low: float = -math.inf,
    high: float = math.inf,
    digits: int = 3,
) -> Row:
    """Return a row for a figure that must lie in [low, high]; NaN fails."""
    shown = f"{measured:+.{digits}f}" if "delta" in figure else f"{measured:.{digits}f}"
    return Row(where, plant, figure, shown, _range(low, high), bool(low <= measured <= high))


def reported(where: str, plant: str, figure: str, measured: float, digits: int = 3) -> Row:
    """Return a row for a figure without requirement."""
    return Row(where, plant, figure, f"{measured:.{digits}f}")


def failures(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that fail."""
    return [row for row in rows if row.passed is False]


def as_text(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table that is also readable in a terminal."""
    cells = [(row.where, row.plant, row.figure, row.measured, row.required, VERDICTS[row.passed]) for row in rows]
    return tables.aligned([HEADER, *cells])


def _range(low: float, high: float) -> str:
    if low == high:
        return f"exactly {low:g}"
    if math.isinf(high):
        return f">= {low:g}"
    if math.isinf(low):
        return f"<= {high:g}"
    return f"{low:g} to {high:g}"


def read(text: str) -> list[Row]:
    """Return the rows of a table of `as_text`, anywhere in a text."""
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    verdicts = {shown: passed for passed, shown in VERDICTS.items()}
    return [
        Row(where, plant, figure, measured, required, verdicts[verdict])
        for where, plant, figure, measured, required, verdict in cells
    ]
