"""Load a user's own task: a table with columns `text` and `label`, and optionally `group`, `start`, `end`, `task`.

text   the model's input
label  0/1, true/false, or two other classes, of which the larger number or alphabetically later word is 1; with more
       classes, each gets a one-vs-rest probe. Rows without a label (empty, nan, NA) are dropped (`labels`)
group  rows of one group never fall on both sides of a split (`person_ids`); default: the probed characters, casefolded
start, end  characters [start, end) to probe; default: the text's last word (`people.last_word`)
task   the probe's name, for several probes in one file; default: the file's name

Other column names are mapped with `columns`. Rows with the same text and span count once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.system.person_ids import group_key
from delta_selectivity.tasks.labels import is_missing, read_classes
from delta_selectivity.tasks.people import last_word, plain_key
from delta_selectivity.tasks.read_records import read_table
from delta_selectivity.tasks.table import Record
from delta_selectivity.tasks.types import Mention, ProbeSpec, Row, RowSet, Task
from delta_selectivity.tasks.user_data import REQUIRED, UserData

logger = logging.getLogger(__name__)

MAX_CLASSES = 64  # more distinct labels suggest a wrong column


def load_user_task(data: UserData) -> Task:
    """Read the user's task; its name is the file's stem, the folder's name, or the Hub's.

    Raises a one-line `RequestError` with file and line if the data cannot be probed.
    """
    table = read_table(data)
    _check_columns(table.columns, data)
    if not table.records:
        raise RequestError(f"{data.flag}: it has no rows")
    name = _name(data)
    by_task: dict[str, list[Row]] = {}
    spellings: dict[str, Any] = {}
    unlabelled: list[str] = []
    for record in table.records:
        where = f"{data.flag}, {record.where}"
        task, typed = _task(record, name, where), record.values.get("task")
        if spellings.setdefault(task, typed) != typed:
            raise RequestError(
                f"{where}: tasks {typed!r} and {spellings[task]!r} differ in spaces only: use one spelling"
            )
        rows, mention = by_task.setdefault(task, []), _mention(record.values, where)
        label = record.values.get("label")
        if is_missing(label):
            unlabelled.append(record.where)
        else:
            rows.append(Row(mention, _encodable(str(label).strip(), "label", where)))
    if unlabelled:
        logger.warning(
            "%s: %d of %d rows have no label and are left out; the first is %s",
            data.flag, len(unlabelled), len(table.records), unlabelled[0],
        )  # fmt: skip
    row_sets = tuple(_row_set(task, rows, data) for task, rows in by_task.items())
    _check_probe_names(row_sets, data)
    return Task(name=name, slug=name, row_sets=row_sets)


def _name(data: UserData) -> str:
    path = Path(data.path_or_name)
    return path.stem if path.is_file() else path.resolve().name.replace(":", "_")


def _check_columns(columns: Sequence[str], data: UserData) -> None:
    missing = [column for column in REQUIRED if column not in columns]
    if ("start" in columns) != ("end" in columns):
        missing.append("end" if "start" in columns else "start")
    if missing:
        raise RequestError(
            f"{data.flag}: missing column{'s'[: len(missing) - 1]} {', '.join(missing)}; found {', '.join(columns)}: "
            f"map your column names with `columns` {missing[0]}=..."
        )


def _check_probe_names(row_sets: Sequence[RowSet], data: UserData) -> None:
    names = [probe.name for row_set in row_sets for probe in row_set.probes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RequestError(f"{data.flag}: two probes would have the name {twice[0]!r}: rename a task")


def _task(record: Record, default: str, where: str) -> str:
    if "task" not in record.values:
        return default
    task = record.values["task"]
    if not isinstance(task, str) or not task.strip():
        raise RequestError(f"{where}: task is {task!r}, but must be the probe's name")
    return _encodable(task.strip(), "task", where)


def _mention(values: Mapping[str, Any], where: str) -> Mention:
    text = values.get("text")
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"{where}: text is {text!r}, but must have words")
    _encodable(text, "text", where)
    start, end = _span(values, text, where)
    group = _missing_as_none(values.get("group"))
    person = plain_key(text[start:end]) if group is None else _encodable(group_key(group), "group", where)
    return Mention(text=text, start=start, end=end, person=person)


def _span(values: Mapping[str, Any], text: str, where: str) -> tuple[int, int]:
    """Return the characters [start, end) to probe, without surrounding whitespace."""
    given = [_missing_as_none(values.get(key)) for key in ("start", "end")]
    span = last_word(text)
    if given != [None, None]:
        start, end = (_integer(value, key, where) for key, value in zip(("start", "end"), given, strict=True))
        if not 0 <= start < end <= len(text):
            raise RequestError(f"{where}: span {start} to {end} is outside the text's {len(text)} characters")
        inside = text[start:end]
        first = start + len(inside) - len(inside.lstrip())
        span = (first, first + len(inside.strip())) if inside.strip() else None
    if span is None:
        raise RequestError(f"{where}: the span to probe is whitespace")
    return span


def _integer(value: Any, key: str, where: str) -> int:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not number.is_integer():
        raise RequestError(f"{where}: {key} is {value!r}, but must be a whole number of characters")
    return int(number)


def _encodable(value: str, column: str, where: str) -> str:
    """Return the value. Raises `RequestError` for an unpaired surrogate, which has no UTF-8 encoding."""
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise RequestError(f"{where}: {column} has an unpaired surrogate: {value!a:.60}")
    return value


def _missing_as_none(value: Any) -> Any:
    """Return None for a missing value in a table: None, NaN, or only whitespace."""
    blank = isinstance(value, str) and not value.strip()
    return None if blank or (isinstance(value, float) and math.isnan(value)) else value


def _row_set(task: str, rows: Sequence[Row], data: UserData) -> RowSet:
    if not rows:
        raise RequestError(f"{data.flag}: no row of {task!r} has a label: is label the right column?")
    classes = read_classes(row.value for row in rows)
    values = classes.values
    if classes.fractions:
        raise RequestError(
            f"{data.flag}: labels of {task!r} are fractions, such as {classes.fractions[0]}: probes need classes; "
            "give whole numbers or words, for example 1 above a threshold and 0 below it"
        )
    for spellings in classes.merged:
        logger.warning("%s: labels %s are one class", task, " and ".join(map(repr, spellings)))
    if len(values) < 2:
        raise RequestError(f"{data.flag}: every label of {task!r} is {values[0]!r}: a probe needs rows of two classes")
    if len(values) > MAX_CLASSES:
        raise RequestError(
            f"{data.flag}: {task!r} has {len(values)} distinct labels, more than {MAX_CLASSES}: "
            f"is label the right column? It has {values[0]!r}, {values[1]!r}"
        )
    return RowSet(tuple(Row(row.mention, classes.class_of[row.value]) for row in rows), _probe_specs(task, values))


def _probe_specs(task: str, values: Sequence[str]) -> tuple[ProbeSpec, ...]:
    if len(values) == 2:
        if tuple(values) != ("0", "1"):
            logger.info("%s: label %r counts as 1, %r as 0", task, values[1], values[0])
        return (ProbeSpec(task, values[1]),)
    return tuple(ProbeSpec(f"{task}_is_{value}", value) for value in values)
