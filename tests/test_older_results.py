"""Result files of older versions: read, shown, and continued by today's program; those of schema 1 are refused."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import pytest

import delta_selectivity as ds
from delta_selectivity.cli import report
from delta_selectivity.models.language_model import ModelInfo

KEPT = Path(__file__).parent / "older_results"
VERSIONS = sorted(path.name.removesuffix(".json.gz") for path in KEPT.glob("*.json.gz"))
ASSETS = KEPT.parents[1] / "assets"
NAME = "tiny-pythia_wikidata_gender.json"
each = pytest.mark.parametrize("version", VERSIONS)


def unpacked(version, folder):
    path = folder / NAME
    path.write_bytes(gzip.decompress((KEPT / f"{version}.json.gz").read_bytes()))
    return path


def test_each_schema_2_version_with_kept_results_is_there():
    assert VERSIONS == ["0.2", "0.3", "0.5"]


@each
def test_every_number_is_read_as_it_was_written(version, tmp_path):
    stored = json.loads(unpacked(version, tmp_path).read_text("utf-8"))
    frame = ds.Results.load(tmp_path).to_frame().set_index("layer")
    assert list(frame.index) == list(range(6))
    for layer, line in frame.iterrows():
        record = stored[f"layer_{layer}"]
        for name, value in {**record, **record["gender"]}.items():
            if isinstance(value, int | float):
                assert math.isclose(line[name], value), (layer, name)
    assert set(frame["verdict"]) <= {"lost", "moved", "preserved", "undecided"}


@each
def test_tables_and_page_show_it(version, tmp_path, capsys):
    unpacked(version, tmp_path)
    assert report.main([str(tmp_path)], "report.py") == 0
    assert report.main([str(tmp_path), "-o", str(tmp_path / "page.html")], "report.py") == 0
    assert re.search(r"^\| +0 +\| gender ", capsys.readouterr().out, re.MULTILINE)
    assert "tiny-pythia-saes-k8" in (tmp_path / "page.html").read_text("utf-8")


@each
def test_the_same_request_finds_everything_done(version, tmp_path, monkeypatch):
    path = unpacked(version, tmp_path)
    stored = json.loads(path.read_bytes())
    monkeypatch.setattr(ModelInfo, "load", None)  # nothing is left for a model to do
    ds.evaluate(ASSETS / "tiny-pythia", ASSETS / "tiny-pythia-saes-k8", ["gender"], output=tmp_path, device="cpu")
    now = json.loads(path.read_bytes())
    assert now["_run"]["key"] == stored["_run"]["key"]
    for layer in (f"layer_{number}" for number in range(6)):
        for found in (now[layer]["gender"], stored[layer]["gender"]):
            del found["q_value"], found["transfer_q_value"]  # over one dataset now, over five then
        assert now[layer] == stored[layer]


def test_schema_1_is_refused_in_one_line(tmp_path):
    path = unpacked("0.2", tmp_path)
    found = json.loads(path.read_text("utf-8"))
    found["_run"]["schema_version"] = 1
    path.write_text(json.dumps(found), "utf-8")
    with pytest.raises(ds.RequestError, match="is not a result file of schema 2"):
        _ = ds.Results.load(tmp_path)
