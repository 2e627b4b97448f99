"""Files of rows: every format returns the written rows, and invalid files are rejected with one line."""

from __future__ import annotations

import io
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from delta_selectivity.cli import probe
from delta_selectivity.errors import RequestError
from delta_selectivity.records.rows_file import RowProbe, Rows, RowText, load, save
from delta_selectivity.system import unpacked
from delta_selectivity.system.person_ids import person_ids

SUFFIXES = (".safetensors", ".npz", ".parquet")
N, D = 60, 4


def made(n=N) -> Rows:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, D)).astype(np.float32)
    labels = np.arange(n) % 2 == 0
    some = np.arange(n // 2)[::-1].copy()
    return Rows(
        x=x,
        recons={"org/sae.b": x + 1, "a": x * 2},
        probes=(RowProbe("z", np.arange(n), labels, "one"), RowProbe("is_é", some, labels[some], "two")),
        groups=np.arange(n) // 2 - 2**40,
        weights=rng.random(n).astype(np.float32) + 0.5,
        tokens=np.arange(n) % 7,
        order=np.arange(n)[::-1].copy(),
        texts=[RowText(f"text {i // 2} of Ünal", 0, 4, "ünal") for i in range(n)],
        about={"model": "m", "layer": 3, "saes": {"org/sae.b": {}, "a": {}}, "settings": {"folds": 3}},
    )


def foreign(**changed):
    """Return columns as another program writes them; None: omitted."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, D)).astype(np.float32)
    columns = {"x": x, "recon": x + 0.1, "labels": (x[:, 0] > 0).astype(np.int64), "groups": np.arange(N), **changed}
    return {name: values for name, values in columns.items() if values is not None}


def written(path: Path, columns) -> Path:
    if path.suffix == ".npz":
        np.savez_compressed(path, **columns)
    elif path.suffix == ".parquet":
        lists = {
            name: values.tolist() if isinstance(values, np.ndarray) else values for name, values in columns.items()
        }
        pyarrow.parquet.write_table(pyarrow.table(lists), path)
    else:
        save_file({name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in columns.items()}, path)
    return path


def refused(path: Path, capsys) -> str:
    """Return the one-line error for a file."""
    capsys.readouterr()
    assert probe.main([str(path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_written_rows_are_read_back_bitwise(suffix, tmp_path):
    rows, path = made(), tmp_path / f"rows{suffix}"
    save(path, rows)
    first = path.read_bytes()
    found = load(path)
    assert list(found.recons) == ["org/sae.b", "a"]
    assert [(probe.name, probe.dataset) for probe in found.probes] == [("z", "one"), ("is_é", "two")]
    for before, after in zip(rows.probes, found.probes, strict=True):
        np.testing.assert_array_equal(before.rows, after.rows)
        np.testing.assert_array_equal(before.labels, after.labels)
    for name in ("x", "groups", "weights", "tokens", "order"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(found, name))
    for name in rows.recons:
        np.testing.assert_array_equal(rows.recons[name], found.recons[name])
    assert found.about["settings"] == {"folds": 3}
    save(path, rows)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_texts_are_written_for_readers(tmp_path):
    for suffix in SUFFIXES:
        save(tmp_path / f"rows{suffix}", made())
    with np.load(tmp_path / "rows.npz", allow_pickle=False) as file:
        texts = json.loads(bytes(file["texts"]))
        assert texts[file["text_of_row"][7]] == ["text 3 of Ünal", 0, 4, "ünal"]
    table = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pandas()
    assert table["text"][7] == "text 3 of Ünal"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_another_program_is_read(suffix, tmp_path):
    found = load(written(tmp_path / f"theirs{suffix}", foreign()))
    assert list(found.recons) == ["reconstruction"]
    assert [probe.name for probe in found.probes] == ["labels"]
    assert found.x.dtype == np.float32
    assert found.weights is found.tokens is found.order is None


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_groups_may_be_names(suffix, tmp_path):
    names = [f"person {i // 3}" for i in range(N)]
    found = load(written(tmp_path / f"theirs{suffix}", foreign(groups=np.array(names))))
    np.testing.assert_array_equal(found.groups, person_ids(names))


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_spellings_of_one_group_are_one_in_files_of_rows(tmp_path, suffix):
    names = ["7", "7.0", "07", "Zo\u00eb", "Zoe\u0308"] + ["x"] * (N - 5)
    found = load(written(tmp_path / f"theirs{suffix}", foreign(groups=np.array(names)))).groups.tolist()
    assert [found.index(person) for person in found[:6]] == [0, 0, 2, 3, 3, 5]
    whole = load(written(tmp_path / f"whole{suffix}", foreign(groups=np.arange(N) / 1.0)))
    np.testing.assert_array_equal(whole.groups, np.arange(N))


def test_other_numeric_types_are_accepted(tmp_path):
    x = np.arange(N * D).reshape(N, D) / 7
    path = written(tmp_path / "a.safetensors", {"groups": np.arange(N)})
    save_file(
        {"x": torch.from_numpy(x).bfloat16(), "reconstruction": torch.from_numpy(x).half(), "groups": torch.arange(N),
         "labels.odd": torch.arange(N) % 2 == 1}, path,
    )  # fmt: skip
    assert load(path).x.dtype == np.float32
    table = pyarrow.table({
        "x": pyarrow.array(x.tolist(), type=pyarrow.large_list(pyarrow.float64())),
        "recon": pyarrow.array(x.tolist(), type=pyarrow.list_(pyarrow.float32(), D)),
        "labels": np.arange(N) % 2 == 1,
        "groups": np.arange(N, dtype=np.uint16),
        "note": ["kept by its owner"] * N,
    })  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    np.testing.assert_array_equal(load(tmp_path / "a.parquet").x, x.astype(np.float32))


NAN = np.full((N, D), np.nan, np.float32)
BAD = {
    "no x": ({"x": None}, "x is missing"),
    "no recon": ({"recon": None}, "recon is missing"),
    "no labels": ({"labels": None}, "labels is missing"),
    "no groups": ({"groups": None}, "groups is missing"),
    "another width": ({"recon": np.ones((N, D + 1), np.float32)}, "has shape"),
    "flat x": ({"x": np.ones(N, np.float32)}, "[rows, d]"),
    "NaN": ({"recon": NAN}, "NaN"),
    "beyond float32": ({"x": np.full((N, D), 1e300)}, "beyond float32"),
    "one class": ({"labels": np.ones(N, np.int64)}, "both classes"),
    "label 2": ({"labels": np.arange(N) % 3}, "only 0, 1 and -1"),
    "label NaN": ({"labels": np.where(np.arange(N) == 5, np.nan, 1.0)}, "row 5 is nan"),
    "groups of fractions": ({"groups": np.arange(N) / 2}, "groups"),
    "weight 0": ({"weights": np.zeros(N)}, "weights"),
    "weights beyond float32": ({"weights": np.full(N, 1e300)}, "weights"),
    "tokens of fractions": ({"tokens": np.arange(N) / 2}, "tokens"),
    "places twice": ({"rows.labels": np.zeros(N, np.int64)}, "each once"),
    "two of one name": ({"reconstruction": np.ones((N, D), np.float32)}, "are both"),
    "no name": ({"recon.": np.ones((N, D), np.float32)}, "no name"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("what", BAD)
def test_unmeasurable_rows_are_rejected_with_one_line(what, suffix, tmp_path, capsys):
    changed, words = BAD[what]
    path = written(tmp_path / f"bad{suffix}", foreign(**changed))
    assert words in refused(path, capsys)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("name", ["labels", "groups", "weights"])
def test_a_column_of_another_length_is_refused(name, suffix, tmp_path, capsys):
    path = written(tmp_path / f"bad{suffix}", foreign(**{name: np.arange(N + 1) % 2}))
    assert f"{name} has shape [61], but x has 60 rows" in refused(path, capsys)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_truncated_or_changed_file_is_rejected(suffix, tmp_path, capsys):
    path = tmp_path / f"rows{suffix}"
    save(path, made())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, capsys)
    path.write_bytes(b"")
    refused(path, capsys)
    path.write_bytes(b"no file of any format")
    refused(path, capsys)
    save(path, replace(made(), about={"settings": {"folds": 2}}))
    assert "folds" in refused(path, capsys)


def test_a_changed_exponent_is_detected(tmp_path, capsys):
    path = tmp_path / "rows.safetensors"
    save(path, made())
    content = bytearray(path.read_bytes())
    content[content.rindex(made().x.tobytes()[:16]) + 2] ^= 1
    path.write_bytes(content)
    assert "changed after it was written" in refused(path, capsys)


@pytest.mark.parametrize(
    "about", ['{"format": 2}', "[]", "{", '{"format": 1, "saes": []}', '{"format": 1, "settings": 3}']
)
def test_a_description_of_another_format_is_refused(about, tmp_path, capsys):
    columns = {name: torch.from_numpy(values) for name, values in foreign().items()}
    save_file(columns, tmp_path / "a.safetensors", metadata={"delta_selectivity": about})
    refused(tmp_path / "a.safetensors", capsys)


def test_names_of_files_are_checked(tmp_path, capsys):
    assert "unknown suffix" in refused(tmp_path / "rows.pt", capsys)
    assert "No such file" in refused(tmp_path / "rows.npz", capsys)
    assert "No such file" in refused(tmp_path / "rows.parquet", capsys)
    (tmp_path / "folder.npz").mkdir()
    refused(tmp_path / "folder.npz", capsys)


class Dropper:
    def __reduce__(self):
        return (Path("dropped").touch, ())


def test_pickles_are_not_opened(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "a.npz", **foreign(groups=np.array([Dropper()] * N, dtype=object)))
    assert "no Python objects" in refused(tmp_path / "a.npz", capsys)
    assert not (tmp_path / "dropped").exists()


def header(shape, descr="<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize(
    ("shape", "descr"),
    [((10**12, 4), "<f4"), ((10**30,), "<f4"), ((-4, 4), "<f4"), ((10**12,), "<U0"), ((0, 4), "<f4")],
)
def test_array_sizes_are_checked_against_the_file(shape, descr, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header(shape, descr) + bytes(64))
    assert "announces" in refused(tmp_path / "a.npz", capsys)


def test_a_file_that_never_ends_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "a.npz")
    assert "a pipe or a device" in refused(tmp_path / "a.npz", capsys)


def test_a_decompression_bomb_is_rejected_before_allocation(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(unpacked, "ALWAYS_ALLOWED", 2**20)
    np.savez_compressed(tmp_path / "a.npz", **foreign(x=np.zeros((2**19, 8), np.float32)))
    assert "decompresses from" in refused(tmp_path / "a.npz", capsys)
    zeros = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(np.zeros(2**22, np.float32)), 8)
    pyarrow.parquet.write_table(pyarrow.table({"x": zeros}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 2**16
    assert "decompresses from" in refused(tmp_path / "a.parquet", capsys)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ({"x": ["a"] * N}, "numbers are needed"),
        ({"x": [[1.0, None]] * N}, "missing values"),
        ({"x": [[1.0, 2.0]] * (N - 1) + [[1.0]]}, "different lengths"),
        ({"x": [[[1.0]]] * N}, "numbers are needed"),
        ({"groups": [None] + ["a"] * (N - 1)}, "missing values"),
        ({"labels": [None] + [1] * (N - 1)}, "missing values"),
        ({"labels": ["yes"] * N}, "numbers are needed"),
    ],
)
def test_a_parquet_column_of_a_wrong_type_is_refused(column, words, tmp_path, capsys):
    assert words in refused(written(tmp_path / "a.parquet", foreign(**column)), capsys)


def test_saving_needs_a_known_suffix(tmp_path):
    with pytest.raises(RequestError, match="unknown suffix"):
        save(tmp_path / "rows.csv", made())


def test_the_example_in_the_documentation_makes_a_file_that_is_measured(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).resolve().parent.parent / "docs" / "rows_file.md").read_text("utf-8")
    example = page.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert probe.main(["rows.npz", "--device2", "cpu", "--repeats", "2"]) == 0
    assert "reconstruction" in capsys.readouterr().out
