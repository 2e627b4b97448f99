"""Scores of a suite: means over all tasks and by family, with tasks treated as a random sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from delta_selectivity.records.result_file import Json
from delta_selectivity.reporting.html import Markup, element, join, table
from delta_selectivity.reporting.names import short_names
from delta_selectivity.reporting.numbers import number, signed, span, typeset
from delta_selectivity.reporting.study import Study

ALL = "all tasks"
DIFFERENCE = "all tasks, paired"
MAX_NAME = 26  # characters of the name of an SAE
HEAD = (
    "SAE", "tasks", "number", "sources", "survives", "95 % interval", "delta_sel", "95 % interval", "SD of tasks",
)  # fmt: skip
MEANING = (
    "Means over tasks with equal weights. The intervals treat tasks and groups (people) as random samples, so they\n"
    "cover other tasks of the same kind. Tasks from one source are one sampling unit. A single source has no interval."
)


class Line(NamedTuple):
    """One line of the table: means of one SAE over a family of tasks, or of the paired difference of two SAEs."""

    label: str
    family: str
    level: Json


def lines(study: Study) -> Iterator[Line]:
    """Yield all tasks of each SAE, its families in descending order of loss, and then the differences between SAEs.

    Yields nothing if there is only one family.
    """
    labels = [sae.label for sae in study.saes_and_baselines]
    names = dict(zip(labels, short_names(labels, MAX_NAME), strict=True))
    suites = [sae for sae in study.saes_and_baselines if (sae.level.get("tasks") or {}).get("families")]
    for sae in suites:
        level = sae.level["tasks"]
        yield Line(names[sae.label], ALL, level)
        for family in sorted(level["families"], key=lambda name: _loss_order(level["families"][name])):
            yield Line(names[sae.label], family, level["families"][family])
    for pair in study.neighbours if suites else ():
        if pair.figures.get("tasks"):
            yield Line(f"{names[pair.one.label]} - {names[pair.other.label]}", DIFFERENCE, pair.figures["tasks"])


def _loss_order(level: Json) -> float:
    delta = level.get("delta_sel")
    return 0.0 if delta is None else float(delta)


def family_rows(study: Study) -> list[tuple[str, ...]]:
    """Return the lines for a terminal, below their header; empty if there are none."""
    lines_found = list(lines(study))
    rows = [
        (
            line.label,
            line.family,
            *_counts(line.level),
            number(line.level.get("transfer_r2"), ".3f"),
            _interval(line.level, "transfer_r2", ".3f"),
            number(line.level.get("delta_sel"), "+.4f"),
            _interval(line.level, "delta_sel", "+.4f"),
            number(line.level.get("delta_sel_spread"), ".4f"),
        )
        for line in lines_found
    ]
    return [HEAD, *rows] if rows else []


def family_table(study: Study) -> Markup | None:
    """Return the lines for the page in a collapsed element, with an explanation; None if there are none."""
    lines_found = list(lines(study))
    if not lines_found:
        return None
    rows = [
        [
            line.label,
            line.family,
            *_counts(line.level),
            typeset(number(line.level.get("transfer_r2"), ".3f")),
            _interval(line.level, "transfer_r2", ".3f").replace(" .. ", " to "),
            signed(line.level.get("delta_sel"), 4),
            span(line.level.get("delta_sel_ci_low"), line.level.get("delta_sel_ci_high"), 4),
            number(line.level.get("delta_sel_spread"), ".4f"),
        ]
        for line in lines_found
    ]
    overall_rows = [row for row, line in zip(rows, lines_found, strict=True) if line.family in (ALL, DIFFERENCE)]
    families = [row for row, line in zip(rows, lines_found, strict=True) if line.family not in (ALL, DIFFERENCE)]
    collapsed = element("details", element("summary", f"By family ({len(families)} lines)"), table(HEAD, families))
    return join([element("p", " ".join(MEANING.split())), table(HEAD, overall_rows), collapsed])


def _counts(level: Json) -> tuple[str, str]:
    return str(level.get("n_tasks", "-")), str(level.get("n_sources", "-"))


def _interval(level: Json, score: str, form: str) -> str:
    low, high = (level.get(f"{score}_ci_{end}") for end in ("low", "high"))
    return "-" if low is None or high is None else f"{low:{form}} .. {high:{form}}"
