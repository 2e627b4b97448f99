"""The CSV: every number as the JSON has it, and names that no spreadsheet takes for formulas."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from delta_selectivity.cli import report
from delta_selectivity.records import result_file
from delta_selectivity.records.figures import OF_A_PROBE, OR_NULL
from delta_selectivity.records.result_file import RecordFile
from delta_selectivity.reporting import csv_file, results

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


def test_names_from_data_are_no_formulas(tmp_path):
    path = tmp_path / "m_d.json"
    file = RecordFile.open(path, {}, result_file.describe_run({"sae": "@evil"}), overwrite=False)
    cell = {**dict.fromkeys([*OF_A_PROBE, *OR_NULL], 0.5), "delta_sel": -0.25, "reason": None}
    file.write(
        {0: {"mse_pos": 0.5, "fvu_pos": 0.5, "l0": None, '=HYPERLINK("x")': cell, "a,b\n\x1b[2J": cell, "-1+1": cell}}
    )
    csv_file.write_csv(results.load([path]), tmp_path / "out.csv")
    lines = list(csv.DictReader((tmp_path / "out.csv").open(encoding="utf-8")))
    assert [line["probe"] for line in lines] == ['\'=HYPERLINK("x")', "a,b\\n\\x1b[2J", "'-1+1"]
    assert {line["sae"] for line in lines} == {"'@evil"}
    assert {line["delta_sel"] for line in lines} == {"-0.25"}, "a number is a number"


@pytest.mark.parametrize("target", ["absent/out.csv", "."])
def test_a_csv_that_cannot_be_written_is_told_in_one_line(target, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert report.main([str(DEMO), "--csv", target]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
