"""Invalid data: one line that says what is wrong and where, exit code 2, and no files left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets as hf
import pyarrow
import pyarrow.parquet
import pytest
from conftest import people
from runs import Request

ROWS = people(40)
HEADER = ",".join(ROWS[0])


def csv_of(rows: list[dict[str, Any]]) -> bytes:
    """Return CSV without quotes, which these rows do not need."""
    return "\n".join([HEADER, *(",".join(map(str, row.values())) for row in rows), ""]).encode()


def jsonl_of(*rows: Any) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def changed(number: int, **values: Any) -> list[dict[str, Any]]:
    """Return the rows with other values in one of them."""
    return [row | values if i == number else row for i, row in enumerate(ROWS)]


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def truncated_hub_folder(path: Path) -> None:
    (path / "data").mkdir(parents=True)
    (path / "data" / "train-00000-of-00001.parquet").write_bytes(parquet_of(ROWS)[:-40])


def two_splits(path: Path) -> None:
    rows = hf.Dataset.from_list(ROWS)
    hf.DatasetDict({"test": rows, "validation": rows}).save_to_disk(str(path))


def saved_without_its_rows(path: Path) -> None:
    hf.Dataset.from_list(ROWS).save_to_disk(str(path))
    next(path.glob("*.arrow")).unlink()


def card_that_is_no_yaml(path: Path) -> None:
    path.mkdir()
    (path / "README.md").write_text("---\nconfigs: [\n---\n")


class Broken(NamedTuple):
    """One kind of invalid data."""

    name: str  # of the file or folder
    content: bytes | Callable[[Path], Any]  # or a function that creates it
    told: str  # in the error, after the file's name
    flags: tuple[str, ...] = ()


KINDS = {
    "columns of another kind": Broken("a.csv", b"words,kind\nx,1\n", ": missing columns text, label; found words"),
    "no label": Broken("a.csv", b"text,group\nx,1\n", ": missing column label; found text, group"),
    "start without end": Broken("a.csv", b"text,label,start\nx,1,0\n", ": missing column end; found text, label"),
    "two columns of one name": Broken("a.csv", b"text,label,label\nx,1,0\n", ", line 1: two columns have the name"),
    "numbers of a measurement as labels": Broken(
        "a.csv", csv_of([row | {"label": i * 0.37} for i, row in enumerate(people(200))]), "are fractions, such as 0.37"
    ),
    "one class": Broken("a.csv", csv_of([row | {"label": 1} for row in ROWS]), ": every label of 'a' is '1'"),
    "one class once the contradictions are gone": Broken(
        "a.jsonl", jsonl_of({"text": "x", "label": 1}, {"text": "x", "label": 0}, {"text": "y", "label": 1}),
        "probe 'a' has 1 positives in 1 distinct rows",
    ),
    "span outside of the text": Broken("a.csv", csv_of(changed(4, end=900)), ", line 6: span 7 to 900 is outside"),
    "span the wrong way round": Broken("a.csv", csv_of(changed(4, start=9, end=3)), ", line 6: span 9 to 3 is outside"),
    "span that is no number": Broken("a.csv", csv_of(changed(4, start="x")), ", line 6: start is 'x'"),
    "missing text": Broken("a.jsonl", jsonl_of(*changed(4, text=None)), ", line 5: text is None, but must have words"),
    "empty file": Broken("a.csv", b"", ": it is empty"),
    "empty JSON lines": Broken("a.jsonl", b"\n\n", ": it is empty"),
    "header alone": Broken("a.csv", HEADER.encode() + b"\n", ": it has no rows"),
    "Parquet without rows": Broken(
        "a.parquet", parquet_of(ROWS[:1])[:0] + parquet_of([]), ": it is empty, but needs the columns text and label"
    ),
    "not UTF-8": Broken("a.csv", csv_of(ROWS) + "josé,1,g,0,4\n".encode("latin-1"), ", line 42: not UTF-8 (byte 0xe9)"),
    "UTF-16": Broken("a.csv", csv_of(ROWS).decode().encode("utf-16"), ", line 1: not UTF-8 (byte 0xff)"),
    "NUL byte": Broken("a.csv", csv_of(ROWS) + b"a\0b,1,g,0,1\n", ", line 42: it has a NUL byte"),
    "quote never closed": Broken("a.csv", csv_of(ROWS) + b'"we met,1,g,0,2\n', ", line 42: unexpected end of data"),
    "quote in the middle": Broken("a.csv", csv_of(ROWS) + b'"we" met,1,g,0,2\n', ", line 42: ',' expected after '\"'"),
    "very long field": Broken("a.csv", csv_of(ROWS) + b"x" * 200_000 + b",1,g,0,200001\n", ", line 42: span 0 to 2000"),
    "more fields than names": Broken("a.csv", csv_of(ROWS) + b"we, them,1,g,0,2\n", ", line 42: more fields than"),
    "Parquet cut short": Broken("a.parquet", parquet_of(ROWS)[:-40], ": not a readable Parquet file"),
    "Parquet of zeros": Broken("a.parquet", bytes(500), ": not a readable Parquet file"),
    "JSON cut short": Broken("a.jsonl", jsonl_of(*ROWS)[:-9], ", line 40: not JSON"),
    "a list for a row": Broken("a.jsonl", jsonl_of(*ROWS, ["x", 1]), ", line 41: not a JSON object: '[\"x\", 1]'"),
    "array that is cut short": Broken("a.json", json.dumps(ROWS).encode()[:-1], ": not JSON (Expecting ',' delimiter"),
    "array of lists": Broken("a.json", json.dumps([*ROWS, [1]]).encode(), ", row 41: not a JSON object: '[1]'"),
    "one object over several lines": Broken(
        "a.json", json.dumps({"rows": ROWS}, indent=1).encode(), "give one object per line, or one array"
    ),
    "another delimiter": Broken("a.csv", csv_of(ROWS).replace(b",", b"|"), "missing columns text, label; found text|"),
    "half of a surrogate pair": Broken("a.jsonl", jsonl_of(*changed(4, text="x \ud83d")), ", line 5: text has an"),
    "half of a surrogate pair in a group": Broken(
        "a.jsonl", jsonl_of(*changed(4, group="\ud83d")), ", line 5: group has an unpaired"
    ),
    "suffix that we do not know": Broken("a.xlsx", b"PK", ": unknown suffix '.xlsx': give .csv, .tsv, .json"),
    "folder of something else": Broken("a", Path.mkdir, ": neither a folder of datasets' save_to_disk"),
    "folder called like a file": Broken("a.csv", Path.mkdir, ": neither a folder of datasets' save_to_disk"),
    "folder of the Hub with half a file": Broken("a", truncated_hub_folder, ": cannot be loaded as a dataset (Parquet"),
    "folder of the Hub with a broken card": Broken("a", card_that_is_no_yaml, ": cannot be loaded as a dataset (while"),
    "saved folder without its rows": Broken("a", saved_without_its_rows, ": not a readable folder of datasets"),
    "splits and none is train": Broken("a", two_splits, ": it has no split train, choose one with --dataset_split"),
    "split that is not there": Broken("a", two_splits, "there is no such split", ("--dataset_split", "dev")),
    "split of a file": Broken("a.csv", csv_of(ROWS), ": a file has no splits", ("--dataset_split", "train")),
    "column that is not there": Broken(
        "a.csv", csv_of(ROWS), ": there is no column 'sentence'", ("--dataset_columns", "text=sentence")
    ),
    "column that is none of ours": Broken(
        "a.csv", csv_of(ROWS), "there is no column 'words'; there are text, label", ("--dataset_columns", "words=text")
    ),
    "task that is a figure of the record": Broken(
        "a.csv", csv_of(ROWS).replace(HEADER.encode(), b"text,label,group,start,end,task").replace(b"\n", b",l0\n")
        .replace(b"task,l0", b"task"), "a task may not have the name 'l0'",
    ),
}  # fmt: skip


@pytest.fixture
def ask(tiny_model: Path, tiny_saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that runs in a folder of its own, with another for temporary files."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path / "work")
    request = Request(tiny_model, (tiny_saes,), Path(), tmp_path / "out").plus("--layers", "0")
    return lambda *flags: request.plus(*flags).run()


def everything_in(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_broken_data_is_one_line_exit_2_and_leaves_nothing(ask, tmp_path, capsys, monkeypatch, kind: Broken) -> None:
    from delta_selectivity.models import language_model

    monkeypatch.setattr(language_model.ModelInfo, "load", lambda *a: pytest.fail("the model was loaded"))
    path = tmp_path / kind.name
    if callable(kind.content):
        kind.content(path)
    else:
        path.write_bytes(kind.content)
    before = everything_in(tmp_path)
    capsys.readouterr()
    assert ask("--dataset_file", str(path), *kind.flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING")]
    assert line.startswith("error: ")
    assert line.isprintable()
    assert kind.told in line
    assert everything_in(tmp_path) == before
