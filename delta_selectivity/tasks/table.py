"""Plain records of a user's table with their line numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.tasks.user_data import COLUMNS, UserData


@dataclass(frozen=True)
class Record:
    """One row and its location for error messages: 'line 7' of a text file, 'row 7' of a binary one."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """The content of a file."""

    columns: tuple[str, ...]
    records: tuple[Record, ...]


def numbered(rows: Iterable[Mapping[str, Any]]) -> tuple[Record, ...]:
    """Return records of a source that has rows instead of lines."""
    return tuple(Record(f"row {number}", values) for number, values in enumerate(rows, start=1))


def chosen_columns(data: UserData, found: Iterable[str]) -> dict[str, str]:
    """Return our name -> the user's name, for the columns that exist.

    Raises `RequestError` if `columns` names one that does not.
    """
    columns = tuple(found)
    renamed = dict(data.columns)
    for ours, theirs in data.columns:
        if theirs not in columns:
            raise RequestError(
                f"{data.flag}: `columns` {ours}={theirs}: there is no column {theirs!r}; "
                f"found {', '.join(columns) or 'none'}"
            )
    return {ours: renamed.get(ours, ours) for ours in COLUMNS if renamed.get(ours, ours) in columns}


def label_names(features: Mapping[str, Any]) -> dict[str, Callable[[int], str | None]]:
    """Return column -> function from a class's number to its name, for the class columns of a `datasets.Features`.

    A number without a name becomes None: test splits on the Hub use -1 for undisclosed labels.
    """
    from datasets import ClassLabel  # slow import, already done by any caller that has features

    named = {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}
    return {column: dict(enumerate(names)).get for column, names in named.items()}


def one_line(error: BaseException) -> str:
    """Return the error of another library in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
