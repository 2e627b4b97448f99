"""A table of people, whose columns are groups: a decade of birth, a country, ...

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

NAMES = ("person", "name")  # what the column of people may be called
MOST = 60  # groups of a column that is not of years
YEARS = 0.9  # share of a column's values that makes it one of years; the others are then unknown
_YEAR = re.compile(r"(-?\d{1,4})(?:\.0+)?|(\d{4})-\d\d(?:-\d\d.*)?")

Groups = dict[str, dict[str, str]]  # column -> key of a person -> group


def read_people(path: Path) -> Groups:
    """Read a CSV or TSV file with a column `person` (or `name`); every other column puts people into groups.

    A column of years or dates becomes decades. People are found by their key, as rows have it, or by the last two words
    of their name, as the Wikidata tasks know them. A name that stands for several people, who are in different groups,
    is in none.

    Raises:
        RequestError: The file cannot be read, or a column has more than `MOST` groups.
    """
    table = _read(path)
    names = next((name for name in NAMES if name in table.columns), None)
    if names is None or len(table.columns) < 2:
        raise RequestError(f"`people` {path}: it needs a column {' or '.join(NAMES)}, and columns that group people")
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
    except (TooLarge, ValueError) as error:  # pandas' errors of form are ValueErrors, those of encoding too
        reason = str(error).splitlines()[0] if str(error) else "no table"
        raise RequestError(f"`people` {path}: no table of people: {reason}") from error


def _groups(values: list[str], where: str) -> list[str | None]:
    """The group of each value; None where there is none."""
    known = [value.strip() for value in values]
    years = [_YEAR.fullmatch(value) for value in known]
    if sum(year is not None for year in years) >= YEARS * sum(map(bool, known)) > 0:
        return [f"{int(year[1] or year[2]) // 10 * 10}s" if year else None for year in years]
    if (n := len(set(known) - {""})) > MOST:
        raise RequestError(f"{where} has {n} different values: groups are needed, at most {MOST}")
    return [value or None for value in known]


def _by_key(keys: list[tuple[str, ...]], groups: list[str | None]) -> dict[str, str]:
    found: dict[str, str | None] = {}
    for of_person, group in zip(keys, groups, strict=True):
        for key in of_person if group is not None else ():
            found[key] = group if found.get(key, group) == group else None
    return {key: group for key, group in found.items() if group is not None}


def _keys(name: str) -> tuple[str, ...]:
    """What the rows may call a person of this name."""
    from delta_selectivity.tasks.people import name_span, person_key  # here: with the tasks comes torch

    span = name_span(name)
    last = () if span is None else (person_key(name[slice(*span)]),)
    return tuple(dict.fromkeys((name, person_key(name), *last)))
