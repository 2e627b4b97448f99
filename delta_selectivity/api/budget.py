"""Choose the number of rows of an `Evaluator`, and report the time of a call and the precision of its numbers.

evaluator.budget             # 500 rows of gender (499 people); 0.4 s a call; 95 % intervals: delta_sel +-0.031, ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from delta_selectivity.errors import RequestError

FIRST_ROWS = 500
"""Rows of each task in the first timing of a call."""
PLANNED_SHARE = 0.9
"""Share of the allowed seconds to plan for, because the time of calls varies."""


MEANS = ("delta_sel", "transfer_r2")


@dataclass(frozen=True)
class Budget:
    """Rows of an `Evaluator`, the time of a call, and the precision of its numbers, measured with its first SAE."""

    rows: Mapping[str, int]  # by TASK/PROBE
    people: Mapping[str, int]  # by TASK/PROBE
    seconds: float  # of the fastest call so far
    precision: Mapping[str, float]  # half widths of the 95 % intervals of the means of delta_sel and transfer_r2

    def __str__(self) -> str:
        rows = ", ".join(f"{n} rows of {name} ({self.people[name]} people)" for name, n in self.rows.items())
        intervals = ", ".join(f"{score} ±{half:.3f}" for score, half in self.precision.items())
        return f"{rows}; {self.seconds:.2g} s a call; 95 % intervals: {intervals}"


def budget_of(numbers: Mapping[str, float], seconds: float) -> Budget:
    """Return the budget, from the numbers of a call."""
    counts = {
        what: {name.removesuffix(f"/{what}"): int(n) for name, n in numbers.items() if name.endswith(f"/{what}")}
        for what in ("n_rows", "n_people")
    }
    ends = {score: [numbers.get(f"{score}_ci_{end}") for end in ("low", "high")] for score in MEANS}
    precision = {score: (high - low) / 2 for score, (low, high) in ends.items() if low is not None and high is not None}
    return Budget(counts["n_rows"], counts["n_people"], seconds, precision)


def fitting_rows(seconds_at: Callable[[int], float], seconds: float, max_rows: int) -> int:
    """Return how many rows to use so that a call takes at most `seconds`, but at least `FIRST_ROWS` rows.

    Args:
        seconds_at: Function that sets a number of rows and returns the time of a call. The last number that it is
            called with is the one returned.
        seconds: Maximum time of a call.
        max_rows: Number of available rows.
    """
    n = min(FIRST_ROWS, max_rows)
    took = seconds_at(n)
    previous = (0, 0.0)
    for _ in range(2):
        slope = max((took - previous[1]) / (n - previous[0]), 1e-9)
        wanted = n + (PLANNED_SHARE * seconds - took) / slope
        next_n = int(min(max(wanted, min(FIRST_ROWS, max_rows)), 8 * n, max_rows))
        if (took <= seconds and next_n <= 1.1 * n) or next_n == n:
            break
        previous, n = (n, took), next_n
        took = seconds_at(n)
    return n


def checked_seconds(seconds: object) -> float | None:
    """Return the maximum time of a call; None: no limit. Raises `RequestError` unless it is a positive number."""
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
        raise RequestError(f"`seconds` {seconds!r}: a number above 0 is needed")
    return float(seconds)
