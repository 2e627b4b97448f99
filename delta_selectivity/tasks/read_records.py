"""Read a user's table (CSV, TSV, JSON, JSON lines, Parquet, a `datasets` folder, the Hub) into plain records.

Every failure is a one-line `RequestError` that names the file and, if known, the line.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.system.unpacked import TooLarge, check_size, is_special
from delta_selectivity.tasks.read_datasets import is_hub_name, read_folder, read_hub
from delta_selectivity.tasks.table import Record, Table, chosen_columns, label_names, numbered, one_line
from delta_selectivity.tasks.user_data import REQUIRED, UserData

_BATCH = 1024  # rows of a Parquet file between two checks of its size
_ROW_BYTES = 100  # added to the size of each row, for its Python objects


def read_table(data: UserData) -> Table:
    """Read `data` by its suffix (as in `_READERS`), as a folder, or from the Hub; columns have our names.

    Local files take precedence over the Hub. Raises `RequestError` if nothing has that name, the format is
    unknown, the file is not readable in that format, or a requested column or split does not exist.
    """
    table = _read(data)
    if not table.columns:
        raise RequestError(f"{data.flag}: it is empty, but needs the columns text and label")
    ours = chosen_columns(data, table.columns)
    if all(ours[name] == name for name in ours):
        return table
    unnamed = [column for column in table.columns if column not in ours.values() and column not in ours]
    records = tuple(
        Record(record.where, {name: record.values[column] for name, column in ours.items() if column in record.values})
        for record in table.records
    )
    return Table((*ours, *unnamed), records)


def _read(data: UserData) -> Table:
    name, path = data.path_or_name, Path(data.path_or_name)
    folder, _, config = name.rpartition(":")
    if os.path.isdir(name):  # noqa: PTH112 - False, not an error, for a name that is empty or too long to be a path
        return read_folder(path, None, data)
    if os.path.exists(name):  # noqa: PTH110
        return _read_file(path, data)
    if os.path.isdir(folder):  # noqa: PTH112
        return read_folder(Path(folder), config, data)
    if path.suffix.lower() not in _READERS and is_hub_name(name):
        return read_hub(data)
    raise RequestError(f"{data.flag}: no such file (and not a dataset of the Hub, owner/name or owner/name:config)")


def _read_file(path: Path, data: UserData) -> Table:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise RequestError(
            f"{data.flag}: unknown suffix {path.suffix!r}: give {', '.join(_READERS)}, a datasets folder, "
            "or a dataset of the Hub"
        )
    if is_special(path):
        raise RequestError(f"{data.flag}: a pipe or a device, not a file")
    if data.split is not None:
        raise RequestError(f"{data.flag}: `split` {data.split}: a file has no splits; leave it out")
    return reader(path, data)


def _read_csv(path: Path, data: UserData) -> Table:
    text = _read_text(path, data)
    delimiter = _delimiter(text, data, "\t,;" if path.suffix.lower() == ".tsv" else ",;\t")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # no cell is longer; the default limit is 131,072
    records: list[Record] = []
    columns: list[str] = []
    line = 1  # first line of the next record: a quoted field may span several
    try:
        for fields in reader:
            if not columns:
                columns = _header(fields, data)
            elif len(fields) > len(columns):
                raise RequestError(f"{data.flag}, line {line}: more fields than the header names")
            elif fields:
                records.append(Record(f"line {line}", dict(zip(columns, fields, strict=False))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise RequestError(f"{data.flag}, line {line}: {error}: check its quotes") from error
    return Table(tuple(columns), tuple(records))


def _delimiter(text: str, data: UserData, known: str) -> str:
    """Return the column delimiter: the first known one for which the header has the required columns.

    If there is none, return the one that gives the most columns, so that the error can list them.
    """
    renamed = dict(data.columns)
    needed = {renamed.get(name, name) for name in REQUIRED}
    header = text.lstrip("\r\n").partition("\n")[0]
    found: dict[str, list[str]] = {}
    for delimiter in known:
        with suppress(csv.Error):  # reported when the file is read
            found[delimiter] = next(csv.reader([header], delimiter=delimiter, strict=True), [])
            if needed <= {field.strip() for field in found[delimiter]}:
                return delimiter
    return max(found, key=lambda delimiter: len(found[delimiter]), default=known[0])


def _header(fields: list[str], data: UserData) -> list[str]:
    columns = [field.strip() for field in fields]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise RequestError(f"{data.flag}, line 1: two columns have the name {twice[0]!r}: rename one")
    return columns


def _read_json(path: Path, data: UserData) -> Table:
    """Read a JSON array of objects or JSON lines; both are accepted with either suffix."""
    text = _read_text(path, data)
    if not text.lstrip().startswith("["):
        return _json_lines(text, data)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{data.flag}: not JSON ({one_line(error)})") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise RequestError(f"{data.flag}, row {number}: not a JSON object: {json.dumps(row)[:60]!r}")
    return Table(tuple(dict.fromkeys(key for row in rows for key in row)), numbered(rows))


def _json_lines(text: str, data: UserData) -> Table:
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:  # also for huge integers and deep nesting
            raise RequestError(
                f"{data.flag}, line {number}: not JSON ({one_line(error)}): give one object per line, or one array"
            ) from error
        if not isinstance(values, dict):
            raise RequestError(f"{data.flag}, line {number}: not a JSON object: {line.strip()[:60]!r}")
        records.append(Record(f"line {number}", values))
    return Table(tuple(dict.fromkeys(key for record in records for key in record.values)), tuple(records))


def _read_parquet(path: Path, data: UserData) -> Table:
    import pyarrow  # installed with datasets; needed for this format only
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            wanted = sorted(set(chosen_columns(data, schema.names).values()))
            rows: list[dict[str, Any]] = []
            size = 0
            for batch in file.iter_batches(_BATCH, columns=wanted):
                size += batch.nbytes + batch.num_rows * _ROW_BYTES
                check_size(size, path)
                rows += batch.to_pylist()
    except TooLarge as error:
        raise RequestError(f"{data.flag}: {error}") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise RequestError(f"{data.flag}: not a readable Parquet file ({one_line(error)})") from error
    if b"huggingface" in (schema.metadata or {}):  # written by datasets, possibly with class names
        rows = _with_class_names(rows, schema, data)
    return Table(tuple(schema.names), numbered(rows))


def _with_class_names(rows: list[dict[str, Any]], schema: Any, data: UserData) -> list[dict[str, Any]]:
    from datasets import Features  # slow import, needed for such files only

    try:
        names = label_names(Features.from_arrow_schema(schema))
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # unvalidated JSON
        raise RequestError(f"{data.flag}: its column metadata cannot be read ({one_line(error)})") from error
    return [{key: names[key](value) if key in names else value for key, value in row.items()} for row in rows]


def _read_text(path: Path, data: UserData) -> str:
    try:
        check_size(path.stat().st_size, path)
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{data.flag}: {error.strerror}") from error
    except TooLarge as error:
        raise RequestError(f"{data.flag}: {error}") from error
    try:
        text = content.decode("utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RequestError(
            f"{data.flag}, line {line}: not UTF-8 (byte {content[error.start]:#04x}): save it as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise RequestError(f"{data.flag}, line {line}: it has a NUL byte: save it as UTF-8 text")
    return text


_READERS: dict[str, Callable[[Path, UserData], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}
