"""Scores of a suite: means over all tasks and by family of tasks, with tasks resampled like people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from delta_selectivity.records.result_file import Json
from delta_selectivity.reporting.html import Markup, element, join, table
from delta_selectivity.reporting.names import apart
from delta_selectivity.reporting.numbers import number, signed, span, typeset
from delta_selectivity.reporting.study import Study

ALL = "all tasks"
DIFFERENCE = "all tasks, paired"
LONGEST = 26  # characters of the name of an SAE
HEAD = (
    "SAE", "tasks", "number", "drawn from", "survives", "95 % interval", "delta_sel", "95 % interval", "SD of tasks",
)  # fmt: skip
MEANING = (
    "Over tasks, each counting alike; intervals take tasks as drawn, as well as people: they say where the mean over\n"
    "other tasks of the kind would lie. Tasks from one source are one draw; of one source there is no interval."
)


class Line(NamedTuple):
    """Means of one SAE over the tasks of one family, or of the paired difference of two SAEs."""

    label: str
    family: str
    level: Json


def lines(study: Study) -> Iterator[Line]:
    """Yield all tasks of each SAE, its families in descending order of loss, and then the differences between SAEs.

    Yields nothing if there is only one family.
    """
    labels = [sae.label for sae in study.everything]
    names = dict(zip(labels, apart(labels, LONGEST), strict=True))
    suites = [sae for sae in study.everything if (sae.level.get("tasks") or {}).get("families")]
    for sae in suites:
        level = sae.level["tasks"]
        yield Line(names[sae.label], ALL, level)
        for family in sorted(level["families"], key=lambda name: _order(level["families"][name])):
            yield Line(names[sae.label], family, level["families"][family])
    for pair in study.neighbours if suites else ():
        if pair.found.get("tasks"):
            yield Line(f"{names[pair.one.label]} - {names[pair.other.label]}", DIFFERENCE, pair.found["tasks"])


def _order(level: Json) -> float:
    delta = level.get("delta_sel")
    return 0.0 if delta is None else float(delta)


def family_rows(study: Study) -> list[tuple[str, ...]]:
    """Return the lines for a terminal, below their header; empty if there are none."""
    found = list(lines(study))
    rows = [
        (
            line.label,
            line.family,
            *_counts(line.level),
            number(line.level.get("transfer_r2"), ".3f"),
            _ends(line.level, "transfer_r2", ".3f"),
            number(line.level.get("delta_sel"), "+.4f"),
            _ends(line.level, "delta_sel", "+.4f"),
            number(line.level.get("delta_sel_spread"), ".4f"),
        )
        for line in found
    ]
    return [HEAD, *rows] if rows else []


def family_table(study: Study) -> Markup | None:
    """Return the lines for the page in a collapsed element, with an explanation; None if there are none."""
    found = list(lines(study))
    if not found:
        return None
    rows = [
        [
            line.label,
            line.family,
            *_counts(line.level),
            typeset(number(line.level.get("transfer_r2"), ".3f")),
            _ends(line.level, "transfer_r2", ".3f").replace(" .. ", " to "),
            signed(line.level.get("delta_sel"), 4),
            span(line.level.get("delta_sel_ci_low"), line.level.get("delta_sel_ci_high"), 4),
            number(line.level.get("delta_sel_spread"), ".4f"),
        ]
        for line in found
    ]
    whole = [row for row, line in zip(rows, found, strict=True) if line.family in (ALL, DIFFERENCE)]
    families = [row for row, line in zip(rows, found, strict=True) if line.family not in (ALL, DIFFERENCE)]
    folded = element("details", element("summary", f"By family ({len(families)} lines)"), table(HEAD, families))
    return join([element("p", " ".join(MEANING.split())), table(HEAD, whole), folded])


def _counts(level: Json) -> tuple[str, str]:
    return str(level.get("n_tasks", "-")), str(level.get("n_sources", "-"))


def _ends(level: Json, score: str, form: str) -> str:
    low, high = (level.get(f"{score}_ci_{end}") for end in ("low", "high"))
    return "-" if low is None or high is None else f"{low:{form}} .. {high:{form}}"
