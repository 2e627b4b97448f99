"""Malicious result files: invalid figures, and names that would break the output."""

from __future__ import annotations

import copy
import csv
import json
import re
import sys
from typing import get_type_hints

import pytest
from result_sets import write_set
from test_html_report import Tree

from delta_selectivity.cli import report
from delta_selectivity.probing.selectivity import OPTIONAL, ProbeResult
from delta_selectivity.records import figures, result_file
from delta_selectivity.reporting import drawing
from delta_selectivity.run.reconstruction import Reconstruction

HUGE = 10**400
NAMES = {
    "long": "x" * 300,
    "script": "<script>alert(1)</script>",
    "attribute": "\"' onload=alert(1) x='",
    "control": "a\x1b]0;title\x07\x00b\r\n",
    "right to left": "a\u202egnp.exe\u2066",
    "path": "../../etc/passwd",
    "prototype": "__proto__",
    "surrogate": "a\ud800b",
    "formula": "\t=1+1",
    "markdown": "a|b `c` $x_$",
}


def forge(path, change):
    """Write the file with the content that `change` returns and a matching checksum."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content = change(content) or content
    results = {name: value for name, value in content.items() if name != "_run"}
    sound = json.dumps([results, content["_run"].get("sae_level")], sort_keys=True)
    content["_run"]["results_sha256"] = result_file.hashlib.sha256(sound.encode()).hexdigest()
    path.write_text(json.dumps(content), encoding="utf-8")


def at(*keys, value):
    """Set a value at a place of the content."""

    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def beside(key, value):
    """Add a second layer of this name, with the figures of the first."""

    def change(content):
        content[key] = copy.deepcopy(content["layer_0"]) if value is None else value

    return change


PROBE = ("layer_0", "gender")
LEVEL = ("_run", "sae_level")
FORGED = {
    "text for delta_sel": at(*PROBE, "delta_sel", value="-0.1"),
    "huge delta_sel": at(*PROBE, "delta_sel", value=HUGE),
    "huge figure": at("layer_0", "fvu_pos", value=HUGE),
    "infinite figure": at("layer_0", "l0", value=1e999),
    "no delta_sel": at(*PROBE, "delta_sel", value=None),
    "list for n_people": at(*PROBE, "n_people", value=[1]),
    "beyond what it can be": at(*PROBE, "model_sel", value=1e50),
    "text for q": at(*PROBE, "q_value", value="small"),
    "probe in a probe": at(*PROBE, "sae_sel", value={"sae_sel": 0.5}),
    "reason of numbers": at(*PROBE, value={"reason": 3, "n_rows": 5}),
    "empty probe": at(*PROBE, value={}),
    "no fvu_pos": lambda content: content["layer_0"].pop("fvu_pos") and None,
    "layer of 5000 digits": beside("layer_" + "1" * 5000, None),
    "layer in Arabic digits": beside("layer_\u0663", None),
    "layer that is a list": beside("layer_7", [1, 2]),
    "layer in a layer": beside("layer_7", {"layer_0": {"gender": {"gender": 1}}}),
    "sae_level of text": at(*LEVEL, value="good"),
    "delta_sel of the SAE": at(*LEVEL, "delta_sel", value="good"),
    "interval of the SAE": at(*LEVEL, "delta_sel_ci_low", value=None),
    "compared of a list": at(*LEVEL, "compared", value=[1]),
    "compared without an interval": at(*LEVEL, "compared", value={"b/two": {"delta_sel": 0.1, "transfer_r2": None}}),
    "huge seconds": at("_run", "seconds", "total", value=HUGE),
    "text for seconds": at("_run", "seconds", "total", value="1"),
    "commit": at("_run", "commit", value=12),
    "versions": at("_run", "versions", value={"torch": [2]}),
    "versions of text": at("_run", "versions", value="2"),
    "model": at("_run", "config", "model_name", value={"a": 1}),
    "label": at("_run", "config", "sae_label", value=5),
    "baseline": at("_run", "config", "baseline", value=["mean"]),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_file_is_reported_and_the_others_are_shown(name, tmp_path, capsys):
    folder = write_set(tmp_path / "in", saes=("a/one", "b/two"), layers=[0])
    path = folder / "sae-00" / "tiny-pythia_wikidata_gender.json"
    forge(path, FORGED[name])
    for flags in ([], ["--summary"], ["--resources"], ["--csv", str(tmp_path / "all.csv")]):
        assert report.main([str(folder), *flags]) == 2, flags
        told = capsys.readouterr()
        assert told.err.count("\n") == 1
        assert str(path) in told.err
        assert len(told.err) < 400
        if not flags or flags == ["--summary"]:
            assert ("two" if flags else "sae-01") in told.out
            assert ("one" if flags else "sae-00") not in told.out
    assert {line["sae"] for line in csv.DictReader((tmp_path / "all.csv").open(encoding="utf-8"))} == {"b/two"}


def test_a_page_omits_forged_files_and_a_single_forged_file_is_rejected(tmp_path, capsys):
    folder = write_set(tmp_path / "in", saes=("a/one", "b/two"), layers=[0])
    path = folder / "sae-00" / "tiny-pythia_wikidata_gender.json"
    forge(path, FORGED["text for delta_sel"])
    assert report.main([str(folder), "-o", str(tmp_path / "r.html")]) == 2
    assert "b_two" in (tmp_path / "r.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert report.main([str(path)]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)


def test_written_files_have_all_required_figures():
    measured = {name: kind for name, kind in get_type_hints(ProbeResult).items() if name not in OPTIONAL}
    assert {name for name in figures.PROBE_FIGURES if measured[name] in (float, int)} == set(figures.PROBE_FIGURES)
    assert set(figures.NULLABLE_PROBE_FIGURES) <= measured.keys()
    assert set(figures.LAYER_FIGURES) <= get_type_hints(Reconstruction).keys()


@pytest.mark.parametrize("name", NAMES)
def test_hostile_names_are_harmless_in_every_output(name, tmp_path, monkeypatch, capsys):
    hostile = NAMES[name]
    folder = write_set(
        tmp_path / "in", saes=("a/one", "b/two"), layers=[0], edit=lambda cells: {hostile: cells["gender"]}
    )
    for path in folder.rglob("*.json"):
        forge(path, at("_run", "config", "model_name", value=hostile))
    path = folder / "sae-00" / "tiny-pythia_wikidata_gender.json"
    forge(path, at("_run", "config", "sae", value=hostile))
    forge(path, at("_run", "config", "sae_label", value=hostile))
    forge(path, at("_run", "versions", hostile, value=hostile))
    forge(path, at("_run", "config", hostile, value=hostile))
    for flags in ([], ["--summary"], ["--csv", str(tmp_path / "all.csv")]):
        assert report.main([str(folder), *flags]) == 0
        out = capsys.readouterr().out
        assert all(line.isprintable() for line in out.split("\n"))
        assert max(map(len, out.split("\n"))) < 300
    cells = [cell for line in csv.reader((tmp_path / "all.csv").open(encoding="utf-8")) for cell in line]
    assert not any(cell.lstrip().startswith(("=", "@")) for cell in cells)
    (tmp_path / "in" / "sae-01" / path.name).unlink()  # one SAE is enough for the plots, which are slow
    monkeypatch.setattr(drawing, "PNG_DPI", 20)
    assert report.main([str(folder), "-o", str(tmp_path / "r.html"), "--plots", str(tmp_path / "plots")]) == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    root = Tree(text).root
    assert len(root.all("script")) == 1
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", text)
    assert not [node for tag in ("svg", "td", "th", "figure") for node in root.all(tag) if "onload" in node.attributes]
    assert {path.parent for path in (tmp_path / "plots").iterdir()} == {tmp_path / "plots"}
    assert all(re.fullmatch(r"[\w.-]{1,120}", path.name) for path in (tmp_path / "plots").iterdir())


def test_too_many_digits_are_an_error_without_traceback(tmp_path, capsys):
    folder = write_set(tmp_path / "in", saes=("a/one", "b/two"), layers=[0])
    path = folder / "sae-00" / "tiny-pythia_wikidata_gender.json"
    digits = "9" * (sys.get_int_max_str_digits() + 1)
    path.write_text(re.sub(r'"n_people": \d+', f'"n_people": {digits}', path.read_text(encoding="utf-8")))
    assert report.main([str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
