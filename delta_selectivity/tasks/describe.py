"""The table of available tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from delta_selectivity.system.terminal import printable
from delta_selectivity.tasks.assemble import first_rows
from delta_selectivity.tasks.catalogue import DATASET_NAMES, TaskName, read_tasks
from delta_selectivity.tasks.suite_files import ALL, GROUPINGS, number_of
from delta_selectivity.tasks.types import Row, RowSet, Task

_HEADER = (
    "index", "dataset", "family", "probe", "rows as shipped", "distinct rows", "two labels", "groups", "grouped by",
    "classes", "positives", "positive class", "longest text",
)  # fmt: skip
_LEFT_COLUMNS = 4  # text columns; numbers are right-aligned


class _Counts(NamedTuple):
    """Counts of a row set."""

    shipped: int
    rows: list[Row]  # distinct, each with one label
    conflicting: int  # texts with two labels, which are dropped
    longest: int  # characters


def describe_datasets(tasks: Sequence[TaskName] | None = None) -> str:
    """Return a table with one line per probe: rows before and after deduplication, groups, classes and their balance.

    For several tasks, totals follow, and the grouping of the rows of built-in tasks. Arguments and errors as for
    `load_probe_texts`.
    """
    lines: list[tuple[str, ...]] = [_HEADER]
    sums = [0, 0, 0, 0]
    groupings: set[str | None] = set()
    texts: set[int] = set()
    for source in read_tasks(DATASET_NAMES if tasks is None else tasks):
        groupings.add(source.grouping)
        for row_set in source.row_sets:
            counts = _count(row_set)
            lines += [tuple(map(printable, line)) for line in _lines(source, row_set, counts)]
            found = (counts.shipped, len(counts.rows) + counts.conflicting, counts.conflicting, counts.conflicting > 0)
            sums = [total + new for total, new in zip(sums, found, strict=True)]
            texts |= {hash(row.mention.text) for row in row_set.rows}
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    used = [f"{name}: {meaning}" for name, meaning in GROUPINGS.items() if name in groupings]
    shipped, distinct, conflicting, n_with = sums
    total = (
        f"total: {shipped:,} rows, {distinct:,} without duplicates in a file, {len(texts):,} distinct texts; "
        f"{conflicting} texts in {n_with} of the files have two labels and are left out"
    )
    several = [total] if tasks is None or len(tasks) > 1 else []
    notes = [*several, *(["grouped by " + "; ".join(used)] if used else [])]
    return "\n".join([*(_format(line, widths) for line in lines), *([""] if notes else []), *notes])


def _count(row_set: RowSet) -> _Counts:
    first, conflicting = first_rows(row_set)
    rows = [row for identity, row in first.items() if identity not in conflicting]
    return _Counts(
        len(row_set.rows), rows, len(conflicting), max((len(row.mention.text) for row in row_set.rows), default=0)
    )


def _lines(source: Task, row_set: RowSet, counts: _Counts) -> Iterator[tuple[str, ...]]:
    rows = counts.rows
    groups = len({row.mention.person for row in rows})
    classes = len({row.value for row in rows})
    for probe in row_set.probes:
        positives = sum(row.value == probe.positive for row in rows)
        share = f"{positives} ({positives / max(len(rows), 1):.0%})"
        yield (
            _index(source), source.name, source.family or "-", probe.name, str(counts.shipped), str(len(rows)),
            str(counts.conflicting), str(groups), source.grouping or "-", str(classes), share, probe.positive,
            str(counts.longest),
        )  # fmt: skip


def _index(source: Task) -> str:
    """Return the short name by which a request can refer to the task."""
    if source.slug == f"wikidata_{source.name}":
        return str(DATASET_NAMES.index(source.name))
    return str(number_of(source.name)) if source.family is not None and source.name in ALL else "-"


def _format(line: tuple[str, ...], widths: list[int]) -> str:
    cells = [
        cell.ljust(width) if column < _LEFT_COLUMNS else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
