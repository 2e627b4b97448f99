"""Plain records of a user's table that remember their line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.tasks.user_data import COLUMNS, UserData


@dataclass(frozen=True)
class Record:
    """One row and where it stands, for error messages: 'line 7' of a text file, 'row 7' of a binary one."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """What a file holds."""

    columns: tuple[str, ...]
    records: tuple[Record, ...]


def numbered(rows: Iterable[Mapping[str, Any]]) -> tuple[Record, ...]:
    """Records of a source that has rows, not lines."""
    return tuple(Record(f"row {number}", values) for number, values in enumerate(rows, start=1))


def chosen_columns(data: UserData, found: Iterable[str]) -> dict[str, str]:
    """Our name -> theirs, of the columns that are there.

    Raises `RequestError` if `columns` names one that is not.
    """
    there = tuple(found)
    renamed = dict(data.columns)
    for ours, theirs in data.columns:
        if theirs not in there:
            raise RequestError(
                f"{data.flag}: `columns` {ours}={theirs}: there is no column {theirs!r}; "
                f"found {', '.join(there) or 'none'}"
            )
    return {ours: renamed.get(ours, ours) for ours in COLUMNS if renamed.get(ours, ours) in there}


def label_names(features: Mapping[str, Any]) -> dict[str, Callable[[int], str | None]]:
    """Column -> name of a class by its number, for the columns of a `datasets.Features` that have named classes.

    A number without a name becomes None: the Hub's test splits say -1 where they keep the label to themselves.
    """
    from datasets import ClassLabel  # seconds to import; whoever has features has imported it

    named = {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}
    return {column: dict(enumerate(names)).get for column, names in named.items()}


def one_line(error: BaseException) -> str:
    """An error of somebody else's library in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
