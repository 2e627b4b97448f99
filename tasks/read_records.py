"""Reads a user's table - CSV, JSON lines, Parquet or a `datasets` folder - into plain records.

Every failure is one `RequestError` line that names the file and, where there is one, the line.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import RequestError


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


def read_table(path: Path) -> Table:
    """Read `path` by its suffix (.csv, .jsonl, .parquet) or as a folder saved by `datasets`.

    Raises `RequestError` if there is nothing at `path`, its kind is unknown, or it cannot be read as that kind.
    """
    if os.path.isdir(path):  # noqa: PTH112 - False, not an error, for a name too long to be a path
        return _read_folder(path)
    if not os.path.exists(path):  # noqa: PTH110
        raise RequestError(f"--dataset_file {path}: no such file")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise RequestError(
            f"--dataset_file {path}: unknown suffix {path.suffix!r}: give {', '.join(_READERS)} or a datasets folder"
        )
    return reader(path)


def _read_csv(path: Path) -> Table:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    records: list[Record] = []
    columns: list[str] = []
    line = 1  # where the next record begins: a quoted field may span several
    try:
        for fields in reader:
            if not columns:
                columns = [field.strip() for field in fields]
            elif len(fields) > len(columns):
                raise RequestError(f"--dataset_file {path}, line {line}: more fields than the header names")
            elif fields:
                records.append(Record(f"line {line}", dict(zip(columns, fields, strict=False))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise RequestError(f"--dataset_file {path}, line {line}: {error}") from error
    return Table(tuple(columns), tuple(records))


def _read_jsonl(path: Path) -> Table:
    records = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits and endless nesting too
            raise RequestError(f"--dataset_file {path}, line {number}: not JSON ({_one_line(error)})") from error
        if not isinstance(values, dict):
            raise RequestError(f"--dataset_file {path}, line {number}: not a JSON object: {line.strip()[:60]!r}")
        records.append(Record(f"line {number}", values))
    return Table(tuple(dict.fromkeys(key for record in records for key in record.values)), tuple(records))


def _read_parquet(path: Path) -> Table:
    import pyarrow  # comes with datasets; needed for this format only
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, partitioning=None)
    except (pyarrow.ArrowException, OSError) as error:
        raise RequestError(f"--dataset_file {path}: not a readable Parquet file ({_one_line(error)})") from error
    return Table(tuple(table.column_names), _numbered(table.to_pylist()))


def _read_folder(path: Path) -> Table:
    import datasets  # seconds to import, and needed for this format only

    try:
        table = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"--dataset_file {path}: not a folder written by datasets' save_to_disk ({_one_line(error)})"
        ) from error
    if isinstance(table, datasets.DatasetDict):
        raise RequestError(f"--dataset_file {path}: holds splits, name one: {path / next(iter(table), '')}")
    return Table(tuple(table.column_names), _numbered(table.with_format(None)))


def _numbered(rows: Iterable[Mapping[str, Any]]) -> tuple[Record, ...]:
    return tuple(Record(f"row {number}", values) for number, values in enumerate(rows, start=1))


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"--dataset_file {path}: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")  # spreadsheets put a byte order mark first
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RequestError(
            f"--dataset_file {path}, line {line}: not UTF-8 (byte {data[error.start]:#04x}): save it as UTF-8"
        ) from error


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


_READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
