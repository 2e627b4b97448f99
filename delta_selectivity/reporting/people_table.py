"""Read a table of people with columns of groups: decade of birth, country, ...

read_people(Path("people.csv"))["born"]["ada lovelace"]     # "1810s"
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from delta_selectivity.errors import RequestError
from delta_selectivity.system.unpacked import TooLarge, check_size, is_special

if TYPE_CHECKING:
    import pandas

PERSON_COLUMNS = ("person", "name")  # names of the column of people
MAX_GROUPS = 60  # maximum number of groups of a column, except for years
YEARS_SHARE = 0.9  # share of years from which a column counts as years; its other values become unknown
_YEAR = re.compile(r"(-?\d{1,4})(?:\.0+)?|(\d{4})-\d\d(?:-\d\d.*)?")

Groups = dict[str, dict[str, str]]  # column -> key of a person -> group


def read_people(path: Path) -> Groups:
    """Read a CSV or TSV file with a column `person` (or `name`); every other column defines groups of people.

    Years and dates become decades. People are matched by their key in the rows, or by the last two words of their name,
    as in the Wikidata tasks. A name that belongs to people of different groups has no group.

    Raises:
        RequestError: The file is not readable, or a column has more than `MOST` groups.
    """
    table = _read(path)
    names = next((name for name in PERSON_COLUMNS if name in table.columns), None)
    if names is None or len(table.columns) < 2:
        raise RequestError(
            f"`people` {path}: it needs a column {' or '.join(PERSON_COLUMNS)}, and columns that group people"
        )
    keys = [_keys(str(name)) for name in table[names]]
    return {
        str(column): _by_key(keys, _groups(table[column].tolist(), f"`people` {path}: column {column}"))
        for column in table.columns
        if column != names
    }


def _read(path: Path) -> pandas.DataFrame:
    import pandas

    try:
        if is_special(path):
            raise RequestError(f"`people` {path}: a pipe or a device, not a file")
        check_size(path.stat().st_size, path)
        return pandas.read_csv(
            path, sep="\t" if path.suffix.lower() == ".tsv" else ",", dtype=str, encoding="utf-8-sig",
            keep_default_na=False, compression=None,
        )  # fmt: skip
    except OSError as error:
        raise RequestError(f"`people` {path}: cannot be read: {error.strerror or error}") from error
    except (TooLarge, ValueError) as error:  # pandas' parsing and decoding errors are ValueErrors
        reason = str(error).splitlines()[0] if str(error) else "no table"
        raise RequestError(f"`people` {path}: no table of people: {reason}") from error


def _groups(values: list[str], where: str) -> list[str | None]:
    """Return the group of each value; None if it has none."""
    known = [value.strip() for value in values]
    years = [_YEAR.fullmatch(value) for value in known]
    if sum(year is not None for year in years) >= YEARS_SHARE * sum(map(bool, known)) > 0:
        return [f"{int(year[1] or year[2]) // 10 * 10}s" if year else None for year in years]
    if (n := len(set(known) - {""})) > MAX_GROUPS:
        raise RequestError(f"{where} has {n} different values: groups are needed, at most {MAX_GROUPS}")
    return [value or None for value in known]


def _by_key(keys: list[tuple[str, ...]], groups: list[str | None]) -> dict[str, str]:
    group_of: dict[str, str | None] = {}
    for keys_of_person, group in zip(keys, groups, strict=True):
        for key in keys_of_person if group is not None else ():
            group_of[key] = group if group_of.get(key, group) == group else None
    return {key: group for key, group in group_of.items() if group is not None}


def _keys(name: str) -> tuple[str, ...]:
    """Return the possible keys in the rows of a person with this name."""
    from delta_selectivity.tasks.people import name_span, person_key  # here, because tasks import torch

    span = name_span(name)
    last = () if span is None else (person_key(name[slice(*span)]),)
    return tuple(dict.fromkeys((name, person_key(name), *last)))
