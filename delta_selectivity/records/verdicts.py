"""The verdict on a probe in one word: preserved, moved, lost or undecided.

    verdict(results["layer_4"]["gender"])       # "lost"

The rules are in `verdict` and in docs/numbers.md. They need only the numbers of a record, so anybody can apply them.
"""

from __future__ import annotations

from delta_selectivity.records.result_file import Json

PRESERVED, MOVED, LOST, UNDECIDED, NOT_MEASURED = "preserved", "moved", "lost", "undecided", "not measured"
MARKS = {PRESERVED: "=", MOVED: "→", LOST: "▼", UNDECIDED: "?", NOT_MEASURED: "–"}
"""A sign for each verdict, distinguishable without colour."""
LEVEL = 0.05  # level of the false discovery rate


def is_significant(result: Json) -> bool:
    """Return whether delta_sel differs from 0 after Benjamini-Hochberg; False until a complete run has q values."""
    q_value = result.get("q_value")
    return q_value is not None and q_value < LEVEL


def is_preserved(result: Json) -> bool:
    """Return whether delta_sel was shown to be small."""
    return bool(result.get("preserved"))


def is_known(result: Json) -> bool:
    """Return whether the model's own probe is above chance; otherwise there is nothing to preserve or lose."""
    return bool(result["model_ci_low"] > 0.5)


def verdict(result: Json) -> str:
    """Return the verdict for a probe's record in a result file. The first rule that holds decides.

    not measured: The record has a `reason` in place of numbers.
    undecided: The model is not shown to know it (`model_ci_low` is not above 1/2), or there are no q values yet.
    lost: `q_value` is below 0.05, and `delta_sel` is negative and not `preserved`. A probe fitted anew finds less.
    undecided: `delta_sel` is neither shown to be small (`preserved`) nor a significant gain.
    moved: The same test finds a loss in `transfer_delta`. A probe fitted anew finds the answer, but the model's own
        probe does not.
    preserved: Otherwise.
    """
    if result.get("reason"):
        return NOT_MEASURED
    if result.get("q_value") is None or not is_known(result):
        return UNDECIDED
    if _is_significant_loss(result, "delta_sel", ""):
        return LOST
    if not (is_preserved(result) or (is_significant(result) and result["delta_sel"] > 0)):
        return UNDECIDED
    return MOVED if _is_significant_loss(result, "transfer_delta", "transfer_") else PRESERVED


def _is_significant_loss(result: Json, difference: str, prefix: str) -> bool:
    """Return whether a difference is a significant loss that is not shown to be small."""
    q_value, value = result.get(f"{prefix}q_value"), result.get(difference)
    if q_value is None or value is None:  # a baseline without a reconstruction has no transfer
        return False
    return bool(q_value < LEVEL and value < 0 and not result.get(f"{prefix}preserved"))
