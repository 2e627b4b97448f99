"""The page's table of all cells, with sorting and filters that need no server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from delta_selectivity.reporting.html import Markup, element
from delta_selectivity.reporting.names import apart
from delta_selectivity.reporting.numbers import fvu_whole, number, people, probability, signed, span, typeset
from delta_selectivity.reporting.results import further_views
from delta_selectivity.reporting.study import Cell, Sae, Study


@dataclass(frozen=True)
class Column:
    """One column of the table."""

    name: str
    first: str = "ascending"  # the order that one wants first
    narrow: bool = True  # whether it is there on a phone, too


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
FILTERS = {"SAE": 0, "dataset": 1, "probe": 2, "verdict": 5}  # what can be chosen from, and its column
Shown = tuple[str | Markup, Any]  # of a cell: what is read, and what is sorted by (a number, or the text)


def cell_table(study: Study) -> Markup:
    """The controls and the table."""
    views = further_views(cell.result for sae in study.everything for cell in sae.cells)
    labels = [sae.label for sae in study.everything]
    names = dict(zip(labels, apart(labels, NAME), strict=True))
    rows = [
        [(names[sae.label], sae.label), *_values(sae, cell)[1:], *_views(cell, views)]
        for sae in study.everything
        for cell in sae.cells
    ]
    columns = [*COLUMNS, *(Column(view, "descending", narrow=False) for view in views)]
    head = element("thead", element("tr", *map(_head, columns)))
    body = element("tbody", *(_row(columns, values) for values in rows))
    table = element("table", head, body, id="cells")
    return element("div", _controls(rows), element("div", table, class_="scroll tall", tabindex="0"))


def _values(sae: Sae, cell: Cell) -> list[Shown]:
    names: list[Shown] = [(name, name) for name in (sae.label, cell.dataset, cell.probe)]
    where: list[Shown] = [*names, (str(cell.layer), cell.layer)]
    figures: list[Shown] = [
        (number(cell.figures["fvu_pos"], ".3f"), cell.figures["fvu_pos"]),
        (fvu_whole(cell.figures), cell.figures.get("fvu_whole")),
        (number(cell.figures["l0"], ".1f"), cell.figures["l0"]),
    ]
    if not cell.measured:
        reason = element("small", str(cell.result["reason"]))
        none: Shown = ("–", None)
        return [*where, (reason, None), (cell.verdict, cell.verdict), none, none, none, none, *figures, none]
    found = cell.result
    return [
        *where,
        (_delta(cell), found["delta_sel"]),
        (cell.verdict, cell.verdict),
        (number(found["model_sel"], ".3f"), found["model_sel"]),
        (number(found["sae_sel"], ".3f"), found["sae_sel"]),
        (probability(found.get("q_value")), found.get("q_value")),
        (typeset(number(found["transfer_r2"], ".3f")), found["transfer_r2"]),
        *figures,
        (people(found), found["n_people"]),
    ]


def _views(cell: Cell, views: Sequence[str]) -> list[Shown]:
    return [(number(cell.result.get(view), ".3f"), cell.result.get(view)) for view in views]


def _delta(cell: Cell) -> Markup:
    interval = element("small", span(cell.result["ci_low"], cell.result["ci_high"]))
    return Markup(f"{signed(cell.result['delta_sel'])} {interval}")


def _head(column: Column) -> Markup:
    button = element("button", column.name, type="button", data_first=column.first)
    return element("th", button, scope="col", aria_sort="none", class_=_class(column))


def _row(columns: Sequence[Column], values: Sequence[Shown]) -> Markup:
    return element(
        "tr",
        *(
            element("td", shown, data_v="" if key is None else str(key), class_=_class(column))
            for column, (shown, key) in zip(columns, values, strict=True)
        ),
    )


def _class(column: Column) -> str | None:
    return None if column.narrow else "wide"


def _controls(rows: Sequence[Sequence[Shown]]) -> Markup:
    values = {name: dict.fromkeys(str(row[index][1]) for row in rows) for name, index in FILTERS.items()}
    chosen = (_choice(name, FILTERS[name], found) for name, found in values.items() if len(found) > 1)
    search = element("label", "search ", element("input", type="search", id="search"))
    count = element("output", f"{len(rows)} of {len(rows)}", id="count", aria_live="polite")
    return element("form", *chosen, search, count, class_="controls", id="filters")


def _choice(name: str, index: int, values: Iterable[str]) -> Markup:
    options = [element("option", "all", value=""), *(element("option", value, value=value) for value in values)]
    return element("label", f"{name} ", element("select", *options, data_column=str(index)))
