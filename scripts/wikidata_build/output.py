"""Write the file as JSON lines, CSV or Parquet, chosen by its suffix; atomically."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

from delta_selectivity.errors import RequestError
from delta_selectivity.system.whole_file import replacing
from scripts.wikidata_build.selection import COLUMNS, Row, as_records

SUFFIXES = (".jsonl", ".csv", ".parquet")


def check_output(path: Path, overwrite: bool) -> None:
    """Check, before the long work, that the file can be written and may be replaced. Raises `RequestError` if not."""
    if path.suffix not in SUFFIXES:
        raise RequestError(f"-o {path}: unknown suffix {path.suffix!r}: give {', '.join(SUFFIXES)}")
    if path.is_dir() or (path.exists() and not overwrite):
        raise RequestError(f"-o {path}: already exists: choose another name, or use --overwrite")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise RequestError(f"-o {path}: the folder {path.parent} is missing or not writable")


def write(path: Path, rows: list[Row]) -> None:
    """Replace the file at `path`."""
    records = as_records(rows)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        with replacing(path, "wb") as file:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
        return
    with replacing(path, "w", encoding="utf-8") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)
        else:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
