"""Number of rows an `Evaluator` uses, the time of a call, and the precision of its numbers.

evaluator.budget             # 500 rows of gender (499 people); 0.4 s a call; 95 % intervals: delta_sel +-0.031, ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from delta_selectivity.errors import RequestError

FIRST_TRY = 500
"""Rows of each task in the first timing of a call."""
SPARE = 0.9
"""Share of the allowed seconds to plan for, because the time of calls varies."""


MEANS = ("delta_sel", "transfer_r2")


@dataclass(frozen=True)
class Budget:
    """Data behind the numbers of an `Evaluator` and the time of a call, measured with its first SAE."""

    rows: Mapping[str, int]  # by TASK/PROBE
    people: Mapping[str, int]  # by TASK/PROBE
    seconds: float  # of the fastest call so far
    precision: Mapping[str, float]  # half widths of the 95 % intervals of the means of delta_sel and transfer_r2

    def __str__(self) -> str:
        rows = ", ".join(f"{n} rows of {name} ({self.people[name]} people)" for name, n in self.rows.items())
        reach = ", ".join(f"{score} ±{half:.3f}" for score, half in self.precision.items())
        return f"{rows}; {self.seconds:.2g} s a call; 95 % intervals: {reach}"


def budget_of(numbers: Mapping[str, float], seconds: float) -> Budget:
    """Return the budget, from the numbers of a call."""
    counts = {
        what: {name.removesuffix(f"/{what}"): int(n) for name, n in numbers.items() if name.endswith(f"/{what}")}
        for what in ("n_rows", "n_people")
    }
    ends = {score: [numbers.get(f"{score}_ci_{end}") for end in ("low", "high")] for score in MEANS}
    precision = {score: (high - low) / 2 for score, (low, high) in ends.items() if low is not None and high is not None}
    return Budget(counts["n_rows"], counts["n_people"], seconds, precision)


def fitting_rows(seconds_at: Callable[[int], float], seconds: float, most: int) -> int:
    """Return how many rows to use so that a call takes at most `seconds`, but at least `FIRST_TRY` rows.

    Args:
        seconds_at: Sets a number of rows and returns the time of a call. The last number passed is the one returned.
        seconds: Maximum time of a call.
        most: Number of available rows.
    """
    n = min(FIRST_TRY, most)
    took = seconds_at(n)
    before = (0, 0.0)
    for _ in range(2):
        slope = max((took - before[1]) / (n - before[0]), 1e-9)
        wanted = n + (SPARE * seconds - took) / slope
        better = int(min(max(wanted, min(FIRST_TRY, most)), 8 * n, most))
        if (took <= seconds and better <= 1.1 * n) or better == n:
            break
        before, n = (n, took), better
        took = seconds_at(n)
    return n


def checked_seconds(seconds: object) -> float | None:
    """Return the seconds of a call. Raises `RequestError` unless it is a positive number."""
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
        raise RequestError(f"`seconds` {seconds!r}: a number above 0 is needed")
    return float(seconds)
