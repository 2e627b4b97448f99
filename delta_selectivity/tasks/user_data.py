"""Where a user's own task is: file or name, split, and names of its columns.

>>> parse_columns("text=sentence, label=class")
(('text', 'sentence'), ('label', 'class'))
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from delta_selectivity.errors import RequestError

REQUIRED = ("text", "label")
COLUMNS = (*REQUIRED, "group", "start", "end", "task")


@dataclass(frozen=True)
class UserData:
    """A table that the user brings."""

    path_or_name: str  # file or folder; else a dataset of the Hub, `owner/name` or `owner/name:config`
    split: str | None = None  # None: train if it is there, else the only one
    columns: tuple[
        tuple[str, str], ...
    ] = ()  # (our name of a column, theirs); a column not named here is as we call it

    def __post_init__(self) -> None:
        """`~` is the home folder, as in a shell: that leaves it alone after `=`, and no shell reads our arguments."""
        object.__setattr__(self, "path_or_name", os.path.expanduser(self.path_or_name))  # noqa: PTH111

    @property
    def flag(self) -> str:
        """What every error message about it begins with."""
        return f"`dataset_file` {self.path_or_name}"


def parse_columns(spec: str) -> tuple[tuple[str, str], ...]:
    """'text=sentence,label=class' as (ours, theirs) pairs; '' as none.

    Raises `RequestError` for a pair without `=`, a column that we do not know, or one of ours named twice.
    """
    pairs: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        ours, equals, theirs = (side.strip() for side in part.partition("="))
        if not equals or not theirs:
            raise RequestError(f"`columns` {part!r}: write our name = yours, e.g. text=sentence,label=class")
        if ours in pairs:
            raise RequestError(f"`columns` {part!r}: {ours} is {pairs[ours]!r} already")
        pairs[ours] = theirs
    return check_columns(pairs)


def check_columns(pairs: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Our column's name -> theirs, as `UserData` keeps it. Raises `RequestError` for a column that we do not know."""
    for ours, theirs in pairs.items():
        if ours not in COLUMNS:
            raise RequestError(f"`columns` {ours}={theirs}: there is no column {ours!r}: name {', '.join(COLUMNS)}")
    return tuple(pairs.items())
