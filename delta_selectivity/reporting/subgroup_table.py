"""Losses of subgroups compared with all others, over all cells, for the page and for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from delta_selectivity.reporting.groups import File
from delta_selectivity.reporting.html import Markup, element, join, table
from delta_selectivity.reporting.names import elide_middle
from delta_selectivity.reporting.numbers import number, probability, signed, span
from delta_selectivity.reporting.rows import rows_of
from delta_selectivity.reporting.study import Study
from delta_selectivity.reporting.subgroup_lines import MEAN_COLUMNS, By, ReadRows, mean_subgroup_lines
from delta_selectivity.reporting.summary import short_label
from delta_selectivity.reporting.tables import Row, aligned
from delta_selectivity.system.terminal import printable

LEGEND = (
    "delta_sel of subgroups of people, averaged over the cells in which both the subgroup and all others have\n"
    "at least 10 effective people of each class. vs others: this delta_sel minus that of all others. A person is in\n"
    "one subgroup of each kind per dataset. All rows of a person count as one sampling unit.\n"
    "q: Benjamini-Hochberg over all lines."
)
MAX_NAME = 60  # characters of a group

Line = dict[str, Any]  # keys are `MEAN_COLUMNS`


def subgroup_section(study: Study, by: By, read: ReadRows) -> list[Markup]:
    """Return a table with a line for each group and SAE; empty if no scores are stored.

    Args:
        study: The SAEs to report on.
        by: Further subgroups.
        read: Returns the rows of a cell.
    """
    by_name = {sae.name: sae for sae in study.saes}
    rows = [
        (
            _group(line), short_label(study, by_name[line["sae"]]), str(line["n_cells"]), f"{line['n_people']:,}",
            _estimate(line, "delta_sel", ""), _estimate(line, "against", "against_"), probability(line["q_value"]),
        )
        for line in _lines([file for sae in study.saes for file in sae.files], by, read)
    ]  # fmt: skip
    head = ("group", "SAE", "cells", "people", "delta_sel", "vs others", "q")
    return [element("p", LEGEND.replace("\n", " ")), table(head, rows)] if rows else []


def subgroup_text(files: Sequence[File], by: By) -> str:
    """Return the same table as text."""
    rows: list[Row] = [
        (
            _group(line), line["sae"], str(line["n_cells"]), str(line["n_people"]),
            f"{line['delta_sel']:+.4f}", f"{line['ci_low']:+.4f} .. {line['ci_high']:+.4f}",
            f"{line['against']:+.4f}", f"{line['against_ci_low']:+.4f} .. {line['against_ci_high']:+.4f}",
            number(line["q_value"], ".3f"),
        )
        for line in _lines(files, by)
    ]  # fmt: skip
    if not rows:
        return "no subgroup has enough people in a cell with stored scores"
    head: Row = ("group", "SAE", "cells", "people", "delta_sel", "95 % interval", "vs others",
                 "95 % interval", "q")  # fmt: skip
    return f"{aligned([head, *rows])}\n\n{LEGEND}"


def _lines(files: Sequence[File], by: By, read: ReadRows = rows_of) -> list[Line]:
    """Return the lines, sorted so that the SAEs of a subgroup follow each other."""
    lines = [
        dict(zip(MEAN_COLUMNS, line, strict=True)) for line in mean_subgroup_lines(files, None, None, None, by, read)
    ]
    groups = list(dict.fromkeys((line["by"], line["group"]) for line in lines))
    return sorted(lines, key=lambda line: groups.index((line["by"], line["group"])))


def _group(line: Line) -> str:
    return elide_middle(printable(f"{line['by']}: {line['group']}"), MAX_NAME)


def _estimate(line: Line, name: str, prefix: str) -> Markup:
    """Return a figure with its interval."""
    ends = span(line[f"{prefix}ci_low"], line[f"{prefix}ci_high"], 4)
    return join([element("b", signed(line[name], 4)), " ", element("small", ends)])
