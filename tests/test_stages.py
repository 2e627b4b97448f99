"""The program of each stage as it is used; all stages together equal a run."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import people, write_csv, write_sparsify
from runs import Request, files, without_q

from delta_selectivity.cli import extract, inspect, probe, tasks
from delta_selectivity.cli.program import COMMANDS
from delta_selectivity.records import result_file
from delta_selectivity.records.rows_file import load
from delta_selectivity.tasks import UserData, load_probe_texts

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def two_tasks(tmp_path) -> Path:
    """Create two tasks in one file: the second has three classes, on reordered rows of the first and on others."""
    rows = people(160)
    names = [{**row, "task": "women"} for row in rows]
    kinds = {"Lind": "lind", "Berg": "berg"}
    other = [
        {**row, "label": kinds.get(row["group"].split()[1][:4], "else"), "task": "family"}
        for row in (*rows[::-1][:90], *people(40, 1))
    ]
    return write_csv(tmp_path / "two.csv", [*names, *other])


@pytest.fixture
def flags(tiny_model, tiny_saes, two_tasks, other_saes):
    """Return the flags that every stage gets."""
    saes = f"{tiny_saes},{other_saes}"
    return ["--model_name", str(tiny_model), "--sae_name", saes, "--dataset_file", str(two_tasks), "--layers", "1",
            "--folds", "3", "--repeats", "2", "--device1", "cpu", "--quiet"]  # fmt: skip


def refused(command, argv, capsys) -> str:
    """Return the one-line error of a command."""
    capsys.readouterr()
    assert command.main([str(word) for word in argv]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
@pytest.mark.parametrize("positions", ["last", "mean", "all"])
def test_the_stages_give_all_numbers_of_a_run(
    positions, suffix, flags, tiny_model, tiny_saes, other_saes, two_tasks, tmp_path
):
    more = ("--positions", positions, "--views", "error", "--layers", "1", "--folds", "3", "--repeats", "2")
    run = Request(tiny_model, (tiny_saes, other_saes), two_tasks, tmp_path / "whole", more)
    assert run.run() == 0
    rows, results = tmp_path / f"rows{suffix}", tmp_path / "results.json"
    assert extract.main([*flags, "--positions", positions, "--views", "error", "-o", str(rows)]) == 0
    assert probe.main([str(rows), "--device2", "cpu", "-o", str(results), "--quiet"]) == 0
    found = json.loads(results.read_text())
    assert len(files(tmp_path / "whole")) == 2
    for path in files(tmp_path / "whole"):
        whole = result_file.read(path)
        (name,) = {name for name in found if Path(name).name == Path(whole["_run"]["config"]["sae"]).name}
        layers = {"ours": found[name], "theirs": whole["layer_1"]}
        ours, theirs = (
            {probe: record for probe, record in layer.items() if isinstance(record, dict)}
            for layer in without_q(layers).values()
        )
        assert ours == theirs
        assert {"women", "family_is_lind", "family_is_berg", "family_is_else"} == ours.keys()
        assert ours["women"]["memorisation"] is not None
        assert ours["women"]["error_sel"] is not None
        if positions == "last":
            for figure in ("mse_pos", "fvu_pos", "cosine"):
                assert found[name][figure] == pytest.approx(whole["layer_1"][figure], rel=1e-6)


def test_settings_come_from_the_file_unless_a_flag_is_given(flags, tmp_path):
    rows = tmp_path / "rows.safetensors"
    assert extract.main([*flags, "-o", str(rows)]) == 0
    assert load(rows).about["settings"]["folds"] == 3
    for given, folds in (([], 3), (["--folds", "4", "--seed", "7"], 4)):
        assert probe.main([str(rows), *given, "--device2", "cpu", "-o", str(tmp_path / "r.json"), "--quiet"]) == 0
        assert json.loads((tmp_path / "r.json").read_text())["_run"]["config"]["folds"] == folds


def test_a_table_of_an_npz_file_and_its_warnings(tmp_path, capsys, caplog):
    rng = np.random.default_rng(0)
    labels = rng.random(200) < 0.5
    x = (rng.normal(size=(200, 8)) + labels[:, None]).astype(np.float32)
    np.savez(tmp_path / "mine.npz", x=x, recon=-5 * x, labels=labels, groups=np.arange(200) // 4)
    with caplog.at_level(logging.WARNING):
        assert probe.main([str(tmp_path / "mine.npz"), "--device2", "cpu", "--repeats", "1"]) == 0
    shown = capsys.readouterr().out
    assert "| reconstruction | labels |" in shown
    assert "delta_sel" in shown
    told = "\n".join(caplog.messages)
    assert all(words in told for words in ("only 50 groups", "FVU", "repeats 1"))


def test_baselines_are_reconstructions_too(flags, tmp_path):
    path = tmp_path / "rows.npz"
    assert extract.main([*flags, "--baselines", "identity,mean", "-o", str(path)]) == 0
    rows = load(path)
    assert len(rows.recons) == 6 or len(rows.recons) == 4
    assert any(np.array_equal(recon, rows.x) for recon in rows.recons.values())


def test_unsupported_extractions_are_rejected(flags, tmp_path, capsys):
    target = ["-o", tmp_path / "rows.npz"]
    assert "--layers 0,1" in refused(extract, [*flags, "--layers", "0,1", *target], capsys)
    assert "--layers all" in refused(extract, [*flags, "--layers", "all", *target], capsys)
    assert "latents" in refused(extract, [*flags, "--views", "latents", *target], capsys)
    assert "names" in refused(extract, [*flags, "--baselines", "names", *target], capsys)
    assert "unknown suffix" in refused(extract, [*flags, "-o", tmp_path / "rows.pt"], capsys)
    assert "cannot be written" in refused(extract, [*flags, "-o", tmp_path / "nowhere" / "rows.npz"], capsys)
    assert "required" in refused(extract, flags, capsys)
    assert not list(tmp_path.glob("rows*"))
    assert not (tmp_path / "results").exists()


def test_probes_refuse_latents_and_wrong_settings(flags, tmp_path, capsys):
    rows = tmp_path / "rows.npz"
    assert extract.main([*flags, "-o", str(rows)]) == 0
    assert "latents" in refused(probe, [rows, "--views", "latents"], capsys)
    assert "--folds" in refused(probe, [rows, "--folds", "1"], capsys)
    assert "cannot be written" in refused(probe, [rows, "--quiet", "-o", tmp_path / "nowhere" / "r.json"], capsys)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_exported_rows_are_the_same_task(suffix, tmp_path, capsys):
    path = tmp_path / f"rows.{suffix}"
    assert tasks.main(["--datasets", "gender,athlete", "--shuffle_select_n", "400", "--export", str(path)]) == 0
    capsys.readouterr()
    before = load_probe_texts(["gender", "athlete"], shuffle_select_n=400)
    (after,) = (texts := load_probe_texts([UserData(str(path))])).datasets
    probes = [probe for dataset in before.datasets for probe in dataset.probes]
    assert [probe.name for probe in after.probes] == [probe.name for probe in probes]
    for one, other in zip(probes, after.probes, strict=True):
        assert [before.mentions[m] for m in one.mentions] == [texts.mentions[m] for m in other.mentions]
        assert one.labels.tolist() == other.labels.tolist()
        assert before.persons[one.mentions].tolist() == texts.persons[other.mentions].tolist()


def test_unusual_texts_are_exported_unchanged(tmp_path):
    words = ['a "quoted", Ada', "two\nlines\r\nLovelace", "  spaces  Ada  ", "naïve 日本 Ümit", "=1+2 Ada\tB"]
    rows = [{"text": f"{text} {i}", "label": i % 2, "group": f'g {i // 2}, "x"'} for i, text in enumerate(words * 6)]
    path = write_csv(tmp_path / "odd.csv", rows)
    before = load_probe_texts([UserData(str(path))])
    for suffix in ("csv", "jsonl", "parquet"):
        assert tasks.main(["--dataset_file", str(path), "--export", str(tmp_path / f"again.{suffix}")]) == 0
        again = load_probe_texts([UserData(str(tmp_path / f"again.{suffix}"))])
        assert again.mentions == before.mentions
        assert again.datasets[0].probes[0].name == "odd"


def test_tasks_prints_what_the_run_lists_and_refuses_in_one_line(tmp_path, capsys):
    assert tasks.main(["--datasets", "gender"]) == 0
    assert "3345" in capsys.readouterr().out
    assert "unknown suffix" in refused(tasks, ["--datasets", "gender", "--export", tmp_path / "rows.xlsx"], capsys)
    assert "cannot be written" in refused(
        tasks, ["--datasets", "gender", "--export", tmp_path / "no" / "a.csv"], capsys
    )
    assert "--seed" in refused(tasks, ["--seed", "3"], capsys)
    twice = write_csv(tmp_path / "mine.csv", [{**row, "task": "gender"} for row in people(30)])
    argv = ["--datasets", "gender", "--dataset_file", twice, "--export", tmp_path / "rows.csv"]
    assert "'gender'" in refused(tasks, argv, capsys)


def test_inspect_without_a_model_describes_the_files(tiny_saes, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert inspect.main([str(tiny_saes)]) == 0
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("sparsify", "resid_post of layers 0, 1, 2", "topk", "96", "32", "8"))
    assert inspect.main([f"{tiny_saes},{write_sparsify(tmp_path / 'other', k=4)}", "--layers", "1"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1 ")]) == 2
    assert "--layers 7" in refused(inspect, [tiny_saes, "--layers", "7"], capsys)
    assert "--bos" in refused(inspect, [tiny_saes, "--bos", "none"], capsys)
    assert "--saes" not in refused(inspect, [tmp_path / "nowhere" / "at" / "all"], capsys)
    assert "NAME" in refused(inspect, [], capsys)


def test_inspect_with_a_model_equals_main_inspect(tiny_model, tiny_saes, people_csv, capsys, tmp_path, monkeypatch):
    from delta_selectivity.cli import main

    monkeypatch.chdir(tmp_path)
    others = ["--model_name", str(tiny_model), "--dataset_file", str(people_csv), "--layers", "1", "--device1", "cpu"]
    assert inspect.main([str(tiny_saes), *others]) == 0
    shown = capsys.readouterr().out
    assert main.main(["inspect", "--sae_name", str(tiny_saes), *others]) == 0
    assert shown == capsys.readouterr().out
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_the_name_of_the_program(command):
    for words, prog in (
        ([str(ROOT / COMMANDS[command].file)], COMMANDS[command].file),
        (["-m", "delta_selectivity", command], f"delta-selectivity {command}"),
    ):
        done = subprocess.run(
            [sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"usage: {prog} ")
        other = "delta-selectivity " if prog.endswith(".py") else ".py "
        assert not any(f"{other}{name}" in done.stdout for name in COMMANDS)
