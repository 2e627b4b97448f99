"""Select the names for the tasks: the most prominent people of each class, as Gurnee et al. do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from scripts.wikidata_build import classes as c
from scripts.wikidata_build.mentions import Found
from scripts.wikidata_build.people import Names


@dataclass(frozen=True)
class Row:
    """A row of the file that `--dataset_file` reads."""

    text: str
    label: str
    group: str  # the name: folds treat all people with the name as one
    start: int  # first character of the name
    end: int
    task: str


COLUMNS = tuple(Row.__dataclass_fields__)


@dataclass(frozen=True)
class ClassCount:
    """Counts of one class of a task."""

    task: str
    name: str
    found: int  # people of the class whom the texts mention
    people: int  # of them in the file; 0 if the class is excluded
    rows: int


def select(names: Names, found: Mapping[int, Found], least: int, most: int) -> tuple[list[Row], list[ClassCount]]:
    """Return rows, task by task, and the counts of every class.

    A class of fewer than `least` people is excluded, and so is a task with fewer than two classes. At most `most`
    people of a class are taken; if there are exactly two classes, both get the same number.
    """
    rows: list[Row] = []
    counts: list[ClassCount] = []
    for task in c.TASKS:
        people = {code: _ranked(names, found, task, code) for code in range(1, len(task.classes) + 1)}
        enough = {code: of_class for code, of_class in people.items() if len(of_class) >= least}
        limit = min(most, *map(len, enough.values())) if len(enough) == 2 else most
        for code, of_class in people.items():
            taken = of_class[:limit] if code in enough and len(enough) > 1 else []
            made = [row for person in taken for row in _rows(found[person], task, code)]
            counts.append(ClassCount(task.name, task.classes[code - 1], len(of_class), len(taken), len(made)))
            rows += made
    return rows, counts


def _ranked(names: Names, found: Mapping[int, Found], task: c.Task, code: int) -> list[int]:
    """Return the names of that class, the most prominent first; ties are sorted by name."""
    of_class = [row for row in found if names.codes[task.name][row] == code]
    return sorted(of_class, key=lambda row: (-int(names.prominence[row]), found[row].contexts[0].name))


def _rows(found: Found, task: c.Task, code: int) -> list[Row]:
    return [
        Row(context.text, task.label(code), context.name, context.start, len(context.text), task.name)
        for context in found.contexts
    ]


def as_records(rows: list[Row]) -> list[dict[str, str | int]]:
    """Return the rows as dicts, for JSON and Parquet."""
    return [asdict(row) for row in rows]
