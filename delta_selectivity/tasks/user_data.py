"""Location of a user's own task: file or name, split, and column names.

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
    """Reference to a user's table."""

    path_or_name: str  # file or folder; else a dataset of the Hub, `owner/name` or `owner/name:config`
    split: str | None = None  # None: train if it exists, else the only one
    columns: tuple[tuple[str, str], ...] = ()  # (our column name, the user's), for columns with another name

    def __post_init__(self) -> None:
        """Expand `~`, which shells do not expand after `=`, and which Python callers may pass."""
        object.__setattr__(self, "path_or_name", os.path.expanduser(self.path_or_name))  # noqa: PTH111

    @property
    def flag(self) -> str:
        """Return the beginning of every error message about this table."""
        return f"`dataset_file` {self.path_or_name}"


def parse_columns(spec: str) -> tuple[tuple[str, str], ...]:
    """Parse 'text=sentence,label=class' to (ours, theirs) pairs; '' to none.

    Raises `RequestError` for a pair without `=`, an unknown column of ours, or a repeated one.
    """
    pairs: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        ours, equals, theirs = (side.strip() for side in part.partition("="))
        if not equals or not theirs:
            raise RequestError(f"`columns` {part!r}: write ours=yours, such as text=sentence,label=class")
        if ours in pairs:
            raise RequestError(f"`columns` {part!r}: {ours} is already mapped to {pairs[ours]!r}")
        pairs[ours] = theirs
    return check_columns(pairs)


def check_columns(pairs: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return (our name, the user's) pairs for `UserData`. Raises `RequestError` for an unknown column of ours."""
    for ours, theirs in pairs.items():
        if ours not in COLUMNS:
            raise RequestError(
                f"`columns` {ours}={theirs}: there is no column {ours!r}; there are {', '.join(COLUMNS)}"
            )
    return tuple(pairs.items())
