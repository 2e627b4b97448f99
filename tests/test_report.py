"""The CSV: every number of the JSON, and no name that a spreadsheet reads as a formula."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from result_sets import write_changed, write_set

from delta_selectivity.cli import report
from delta_selectivity.records import result_file
from delta_selectivity.records.figures import NULLABLE_PROBE_FIGURES, PROBE_FIGURES
from delta_selectivity.records.result_file import RecordFile
from delta_selectivity.reporting import csv_file, results
from delta_selectivity.reporting.study import study_of

DEMO = Path(__file__).resolve().parent.parent / "results" / "demo"


def test_every_number_of_every_probe_is_in_the_csv(tmp_path):
    out = tmp_path / "all.csv"
    assert report.main([str(DEMO), "--csv", str(out)]) == 0
    lines = list(csv.DictReader(out.open(encoding="utf-8")))
    files = results.load(results.result_files(DEMO))
    expected = [(path, *cell) for path, found in files for cell in results.cells(found)]
    assert len(lines) == len(expected) == 144
    for line, (path, layer, probe, figures, result) in zip(lines, expected, strict=True):
        assert (line["file"], line["layer"], line["probe"]) == (path.stem, str(layer), probe)
        for name in ("delta_sel", "ci_low", "transfer_r2", "q_value", "sae_auc"):
            assert float(line[name]) == result[name]
        assert float(line["fvu_whole"]) == figures["fvu_whole"]


def test_names_are_not_read_as_formulas(tmp_path):
    path = tmp_path / "m_d.json"
    file = RecordFile.open(path, {}, result_file.describe_run({"sae": "@evil"}), overwrite=False)
    cell = {**dict.fromkeys([*PROBE_FIGURES, *NULLABLE_PROBE_FIGURES], 0.5), "delta_sel": -0.25, "reason": None}
    file.write(
        {0: {"mse_pos": 0.5, "fvu_pos": 0.5, "l0": None, '=HYPERLINK("x")': cell, "a,b\n\x1b[2J": cell, "-1+1": cell}}
    )
    csv_file.write_csv(results.load([path]), tmp_path / "out.csv")
    lines = list(csv.DictReader((tmp_path / "out.csv").open(encoding="utf-8")))
    assert [line["probe"] for line in lines] == ['\'=HYPERLINK("x")', "a,b\\n\\x1b[2J", "'-1+1"]
    assert {line["sae"] for line in lines} == {"'@evil"}
    assert {line["delta_sel"] for line in lines} == {"-0.25"}, "a number is a number"


@pytest.mark.parametrize("target", ["absent/out.csv", "."])
def test_an_unwritable_csv_is_one_line(target, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert report.main([str(DEMO), "--csv", target]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: --csv {target}: cannot be written: ") and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


SAE = DEMO / "tiny-pythia-saes-k8" / "tiny-pythia_wikidata_gender.json"


def summary(*folders):
    return study_of(results.load([path for folder in folders for path in results.result_files(folder)]))


@pytest.mark.parametrize(
    ("key", "config", "told"),
    [
        ({"positions": "mean"}, {}, "positions mean"),
        ({"seed": 1}, {}, "seed 1"),
        ({"dtype": "float32"}, {}, "dtype float32"),
        ({"data": "other rows"}, {"shuffle_select_n": 300}, "shuffle_select_n 300"),
        ({"data": "other rows"}, {}, "in b"),
        ({"sae": "trained on"}, {}, "in b"),
        ({"model": "tuned"}, {"model_name": "my/tuned"}, "model my/tuned"),
        ({"model": "tuned"}, {}, "model assets/tiny-pythia [weights 2]"),
        ({"epsilon": 0.05}, {}, "epsilon 0.05"),
        ({"new_setting": True}, {}, "new_setting on"),
    ],
)
def test_files_with_different_settings_are_not_averaged(key, config, told, tmp_path):
    write_changed(SAE, tmp_path / "a" / SAE.name)
    write_changed(SAE, tmp_path / "b" / SAE.name, key, config)
    saes = summary(tmp_path).saes
    assert len(saes) == 2
    assert saes[1].name == f"assets/tiny-pythia-saes-k8 ({told})"
    assert [len(sae.cells) for sae in saes] == [6, 6]


def test_a_model_with_two_names_counts_once(tmp_path, caplog):
    write_changed(SAE, tmp_path / "a" / "org_tiny_wikidata_gender.json", config={"model_name": "org/tiny"})
    write_changed(SAE, tmp_path / "b" / "tiny_wikidata_gender.json", config={"model_name": str(tmp_path / "tiny")})
    study = summary(tmp_path)
    (sae,) = study.saes
    assert len(sae.cells) == 6
    assert list(study.datasets) == ["wikidata_gender"]
    assert "b/tiny_wikidata_gender.json has layers that" in caplog.text
    assert "counted once" in caplog.text


def test_layers_of_two_runs_are_combined(tmp_path):
    for name, layers in (("a", range(2)), ("b", range(1, 4))):
        write_set(tmp_path / name, layers=layers)
    (sae,) = summary(tmp_path / "a", tmp_path / "b").saes
    assert [cell.layer for cell in sae.cells] == [0, 1, 2, 3]


def test_incomparable_settings_are_reported_with_both_values(tmp_path, capsys):
    other = {"sae": "another"}
    write_changed(SAE, tmp_path / "a" / SAE.name)
    write_changed(SAE, tmp_path / "b" / SAE.name, {"positions": "mean", "seed": 1, "sae": "x"}, other)
    assert report.main([str(tmp_path / "a"), str(tmp_path / "b"), "--summary"]) == 0
    told = capsys.readouterr().out
    assert "not compared with another: positions last and mean; seed 0 and 1" in told
    write_changed(SAE, tmp_path / "b" / SAE.name, {"sae": "x", "data": "y"}, {**other, "dataset_file": "mine.csv"})
    (line,) = summary(tmp_path).not_compared
    assert line.endswith("dataset_file none and mine.csv; different rows of wikidata_gender")
    write_changed(SAE, tmp_path / "b" / SAE.name, {"sae": "x", "model": "y"}, {**other, "model_name": "org/other"})
    assert "model assets/tiny-pythia and org/other" in summary(tmp_path).not_compared[0]
    assert SAE.stem not in "".join(summary(tmp_path).not_compared)


def test_csv_lines_name_model_and_settings(tmp_path):
    write_changed(SAE, tmp_path / "a" / SAE.name, config={"shuffle_select_n": 300})
    write_changed(SAE, tmp_path / "b" / SAE.name, {"positions": "mean", "seed": 7})
    assert report.main([str(tmp_path), "--csv", str(tmp_path / "all.csv")]) == 0
    lines = list(csv.DictReader((tmp_path / "all.csv").open(encoding="utf-8")))
    names = ("model", "sae", "positions", "seed", "shuffle_select_n", "probe_solver", "hookpoint")
    told = dict.fromkeys(tuple(line[name] for name in names) for line in lines)
    shared = ("assets/tiny-pythia", "assets/tiny-pythia-saes-k8")
    assert list(told) == [
        (*shared, "last", "0", "300", "auto", "resid_post"), (*shared, "mean", "7", "", "auto", "resid_post")
    ]  # fmt: skip
    assert {line["probe"] for line in lines} == {"gender"}
    assert all(int(line["n_rows"]) > 0 for line in lines)


def test_a_parent_of_results_suggests_its_subfolders(tmp_path, capsys):
    below = write_set(tmp_path / "mine" / "today")
    write_set(tmp_path / ".hidden" / "old")
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip() == f"error: {tmp_path}: no result files; there are some in {below}"
