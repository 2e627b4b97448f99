"""The page's table of all cells, sorted and filtered by a script in the browser.

The script renders only the visible lines, from data stored beside the table, because browsers are slow with tables of
many thousand lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from delta_selectivity.records.figures import is_number
from delta_selectivity.records.verdicts import MARKS
from delta_selectivity.reporting.html import Markup, element
from delta_selectivity.reporting.names import short_names
from delta_selectivity.reporting.numbers import (
    fvu_whole,
    number,
    people,
    probability,
    signed,
    span,
    typeset,
    unsigned_span,
)
from delta_selectivity.reporting.results import optional_figures
from delta_selectivity.reporting.study import Cell, Study
from delta_selectivity.system.terminal import printable


@dataclass(frozen=True)
class Column:
    """One column of the table."""

    name: str
    first: str = "ascending"  # sort order of the first click
    narrow: bool = True  # whether to show it on narrow screens


class Entry(NamedTuple):
    """One entry of a line."""

    text: str
    sort_key: Any = None  # a number or a text; None comes last
    detail: str = ""  # smaller text below


COLUMNS = (
    Column("SAE"),
    Column("dataset", narrow=False),
    Column("probe"),
    Column("layer"),
    Column("delta_sel"),
    Column("verdict"),
    Column("model_sel", "descending", narrow=False),
    Column("sae_sel", "descending", narrow=False),
    Column("q", narrow=False),
    Column("transfer_r2", narrow=False),
    Column("fvu_pos", narrow=False),
    Column("fvu_whole", narrow=False),
    Column("L0", narrow=False),
    Column("groups", "descending", narrow=False),
)
MAX_NAME = 26  # characters of the name of an SAE
FILTERS = {"SAE": 0, "dataset": 1, "probe": 2, "verdict": 5}  # filters, with the index of their column


def cell_table(study: Study) -> Markup:
    """Return the controls, an empty table, and the data of its lines."""
    views = optional_figures(cell.record for sae in study.saes_and_baselines for cell in sae.cells)
    labels = [sae.label for sae in study.saes_and_baselines]
    names = dict(zip(labels, short_names(labels, MAX_NAME), strict=True))
    rows = [
        [Entry(names[sae.label], sae.label), *_entries(cell), *_optional_entries(cell, views)]
        for sae in study.saes_and_baselines
        for cell in sae.cells
    ]
    columns = [*COLUMNS, *(Column(view, "descending", narrow=False) for view in views)]
    head = element("thead", element("tr", *map(_head, columns)))
    table = element("table", head, element("tbody"), id="cells", aria_rowcount=str(len(rows) + 1))
    script = element("noscript", element("p", "This table needs JavaScript, which is turned off in this browser."))
    data = element("template", embedded_json([list(map(_compact, row)) for row in rows]), id="cell-data")
    return element("div", _controls(rows), script, element("div", table, class_="scroll tall", tabindex="0"), data)


def embedded_json(value: Any) -> Markup:
    """Return JSON that can be embedded in an element, with all markup escaped."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _compact(entry: Entry) -> Any:
    """Return the shortest form of an entry: its text alone if that is also its sort key."""
    if entry.detail:
        return list(entry)
    return entry.text if entry.sort_key == entry.text else [entry.text, entry.sort_key]


def _entries(cell: Cell) -> list[Entry]:
    where = [Entry(cell.dataset, cell.dataset), Entry(cell.probe, cell.probe), Entry(str(cell.layer), cell.layer)]
    verdict = Entry(f"{MARKS[cell.verdict]} {cell.verdict}", cell.verdict)
    figures = [
        Entry(number(cell.figures["fvu_pos"], ".3f"), cell.figures["fvu_pos"]),
        Entry(fvu_whole(cell.figures), cell.figures.get("fvu_whole")),
        Entry(number(cell.figures["l0"], ".1f"), cell.figures["l0"]),
    ]
    if not cell.measured:
        none = Entry("–")
        return [*where, Entry(printable(str(cell.result["reason"]))), verdict, none, none, none, none, *figures, none]
    result = cell.result
    return [
        *where,
        Entry(signed(result["delta_sel"]), result["delta_sel"], span(result["ci_low"], result["ci_high"])),
        verdict,
        Entry(number(result["model_sel"], ".3f"), result["model_sel"]),
        Entry(number(result["sae_sel"], ".3f"), result["sae_sel"]),
        Entry(probability(result.get("q_value")), result.get("q_value")),
        Entry(typeset(number(result["transfer_r2"], ".3f")), result["transfer_r2"]),
        *figures,
        Entry(people(result), result["n_people"]),
    ]


def _optional_entries(cell: Cell, views: Sequence[str]) -> list[Entry]:
    return [Entry(number(cell.record.get(view), ".3f"), cell.record.get(view), _interval(cell, view)) for view in views]


def _interval(cell: Cell, view: str) -> str:
    """Return the interval of an optional figure; empty if there is none."""
    stem = view.removesuffix("_sel")
    low, high = ({**cell.figures, **cell.result}.get(f"{stem}_ci_{end}") for end in ("low", "high"))
    return unsigned_span(low, high) if is_number(low) and is_number(high) else ""


def _head(column: Column) -> Markup:
    button = element("button", column.name, type="button", data_first=column.first)
    return element("th", button, scope="col", aria_sort="none", class_=None if column.narrow else "wide")


def _controls(rows: Sequence[Sequence[Entry]]) -> Markup:
    choices = {name: dict.fromkeys(str(row[index].sort_key) for row in rows) for name, index in FILTERS.items()}
    selects = (_choice(name, FILTERS[name], values) for name, values in choices.items() if len(values) > 1)
    search = element("label", "search ", element("input", type="search", id="search"))
    count = element("output", f"{len(rows)} of {len(rows)}", id="count", aria_live="polite")
    return element("form", *selects, search, count, class_="controls", id="filters")


def _choice(name: str, index: int, values: Iterable[str]) -> Markup:
    options = [element("option", "all", value=""), *(element("option", value, value=value) for value in values)]
    return element("label", f"{name} ", element("select", *options, data_column=str(index)))
