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
from delta_selectivity.reporting.names import apart
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
from delta_selectivity.reporting.results import further_views
from delta_selectivity.reporting.study import Cell, Study
from delta_selectivity.system.terminal import printable


@dataclass(frozen=True)
class Column:
    """One column of the table."""

    name: str
    first: str = "ascending"  # sort order of the first click
    narrow: bool = True  # whether to show it on narrow screens


class Shown(NamedTuple):
    """One entry of a line."""

    text: str
    key: Any = None  # sort key: a number or a text; None comes last
    small: str = ""  # smaller text below it


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
    Column("people", "descending", narrow=False),
)
NAME = 26  # characters of the name of an SAE
FILTERS = {"SAE": 0, "dataset": 1, "probe": 2, "verdict": 5}  # filters, with the index of their column


def cell_table(study: Study) -> Markup:
    """Return the controls, an empty table, and the data of its lines."""
    views = further_views(cell.record for sae in study.everything for cell in sae.cells)
    labels = [sae.label for sae in study.everything]
    names = dict(zip(labels, apart(labels, NAME), strict=True))
    rows = [
        [Shown(names[sae.label], sae.label), *_values(cell), *_views(cell, views)]
        for sae in study.everything
        for cell in sae.cells
    ]
    columns = [*COLUMNS, *(Column(view, "descending", narrow=False) for view in views)]
    head = element("thead", element("tr", *map(_head, columns)))
    table = element("table", head, element("tbody"), id="cells", aria_rowcount=str(len(rows) + 1))
    script = element("noscript", element("p", "The table is drawn by a script, which this browser does not run."))
    data = element("template", as_data([list(map(_compact, row)) for row in rows]), id="cell-data")
    return element("div", _controls(rows), script, element("div", table, class_="scroll tall", tabindex="0"), data)


def as_data(value: Any) -> Markup:
    """Return JSON that can be embedded in an element, with all markup escaped."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _compact(shown: Shown) -> Any:
    """Return only the text if it is also the sort key, else with the key and the text below."""
    if shown.small:
        return list(shown)
    return shown.text if shown.key == shown.text else [shown.text, shown.key]


def _values(cell: Cell) -> list[Shown]:
    where = [Shown(cell.dataset, cell.dataset), Shown(cell.probe, cell.probe), Shown(str(cell.layer), cell.layer)]
    verdict = Shown(f"{MARKS[cell.verdict]} {cell.verdict}", cell.verdict)
    figures = [
        Shown(number(cell.figures["fvu_pos"], ".3f"), cell.figures["fvu_pos"]),
        Shown(fvu_whole(cell.figures), cell.figures.get("fvu_whole")),
        Shown(number(cell.figures["l0"], ".1f"), cell.figures["l0"]),
    ]
    if not cell.measured:
        none = Shown("–")
        return [*where, Shown(printable(str(cell.result["reason"]))), verdict, none, none, none, none, *figures, none]
    found = cell.result
    return [
        *where,
        Shown(signed(found["delta_sel"]), found["delta_sel"], span(found["ci_low"], found["ci_high"])),
        verdict,
        Shown(number(found["model_sel"], ".3f"), found["model_sel"]),
        Shown(number(found["sae_sel"], ".3f"), found["sae_sel"]),
        Shown(probability(found.get("q_value")), found.get("q_value")),
        Shown(typeset(number(found["transfer_r2"], ".3f")), found["transfer_r2"]),
        *figures,
        Shown(people(found), found["n_people"]),
    ]


def _views(cell: Cell, views: Sequence[str]) -> list[Shown]:
    return [Shown(number(cell.record.get(view), ".3f"), cell.record.get(view), _ends(cell, view)) for view in views]


def _ends(cell: Cell, view: str) -> str:
    """Return the interval of an optional figure; empty if there is none."""
    stem = view.removesuffix("_sel")
    low, high = ({**cell.figures, **cell.result}.get(f"{stem}_ci_{end}") for end in ("low", "high"))
    return unsigned_span(low, high) if is_number(low) and is_number(high) else ""


def _head(column: Column) -> Markup:
    button = element("button", column.name, type="button", data_first=column.first)
    return element("th", button, scope="col", aria_sort="none", class_=None if column.narrow else "wide")


def _controls(rows: Sequence[Sequence[Shown]]) -> Markup:
    values = {name: dict.fromkeys(str(row[index].key) for row in rows) for name, index in FILTERS.items()}
    chosen = (_choice(name, FILTERS[name], found) for name, found in values.items() if len(found) > 1)
    search = element("label", "search ", element("input", type="search", id="search"))
    count = element("output", f"{len(rows)} of {len(rows)}", id="count", aria_live="polite")
    return element("form", *chosen, search, count, class_="controls", id="filters")


def _choice(name: str, index: int, values: Iterable[str]) -> Markup:
    options = [element("option", "all", value=""), *(element("option", value, value=value) for value in values)]
    return element("label", f"{name} ", element("select", *options, data_column=str(index)))
