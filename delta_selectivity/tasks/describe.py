"""The table of the tasks there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from delta_selectivity.system.terminal import printable
from delta_selectivity.tasks.assemble import distinct_rows
from delta_selectivity.tasks.catalogue import DATASET_NAMES, TaskName, load_tasks
from delta_selectivity.tasks.types import Task

_HEADER = ("index", "dataset", "probe", "rows as shipped", "distinct rows", "people", "positives", "positive class")
_LEFT_COLUMNS = 3  # the words; numbers line up on the right


def describe_datasets(tasks: Sequence[TaskName] | None = None) -> str:
    """One line per probe: rows before and after duplicates are dropped, people, positives (class balance).

    Arguments and errors as for `load_probe_texts`.
    """
    sources = load_tasks(tasks)
    lines = [_HEADER, *(tuple(map(printable, line)) for source in sources for line in _lines(source))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    return "\n".join(_format(line, widths) for line in lines)


def _lines(source: Task) -> Iterator[tuple[str, ...]]:
    index = str(DATASET_NAMES.index(source.name)) if source.slug == f"wikidata_{source.name}" else "-"
    for shipped, distinct in zip(source.row_sets, distinct_rows(source).row_sets, strict=True):
        rows = distinct.rows
        people = len({row.mention.person for row in rows})
        for probe in distinct.probes:
            positives = sum(row.value == probe.positive for row in rows)
            share = f"{positives} ({positives / len(rows):.0%})"
            counts = (str(len(shipped.rows)), str(len(rows)), str(people), share, probe.positive)
            yield (index, source.name, probe.name, *counts)


def _format(line: tuple[str, ...], widths: list[int]) -> str:
    cells = [
        cell.ljust(width) if column < _LEFT_COLUMNS else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
