"""Common behaviour of the programs: flags, versions, progress bars, and the first and last lines of a run."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import people, write_csv, write_sparsify
from runs import Request

from delta_selectivity.cli import guard, main, probe, scale
from delta_selectivity.cli.command_line import make_request, parse_values
from delta_selectivity.cli.program import COMMANDS
from delta_selectivity.errors import RequestError
from delta_selectivity.reporting.csv_file import csv_text
from delta_selectivity.saes import open_sae
from delta_selectivity.settings import Settings
from delta_selectivity.system import bars
from delta_selectivity.tasks import load_task

ROOT = Path(__file__).resolve().parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]


def program(command):
    return importlib.import_module(f"delta_selectivity.cli.{COMMANDS[command].module}").main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_program_prints_its_version(command, capsys):
    with pytest.raises(SystemExit) as ended:
        program(command)(["--version"], COMMANDS[command].file)
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"delta-selectivity {VERSION}\n"


@pytest.mark.parametrize(
    ("command", "wrong", "meant"),
    [
        ("run", "--sae_nam", "--sae_name"),
        ("run", "--dataset-file", "--dataset_file"),
        ("tasks", "--exprt", "--export"),
        ("inspect", "--layer", "--layers"),
        ("extract", "--outptu", "--output"),
        ("probe", "--repeat", "--repeats"),
        ("scale", "--worker", "--workers"),
        ("scale", "--model_nam=x", "--model_name"),
        ("report", "--sumary", "--summary"),
    ],
)
def test_a_wrong_flag_is_one_line_with_the_nearest(command, wrong, meant, capsys):
    assert program(command)([wrong, "x"], COMMANDS[command].file) == 2
    line = f"error: unknown flag {wrong.partition('=')[0]}: did you mean {meant}? (see --help)"
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        ("run", ["--sae_name", "a", "b"], "'b' is not the value of a flag: separate several values by commas"),
        ("run", ["mine.csv"], "'mine.csv' is not the value of a flag"),
        ("run", ["--sae_name", "a", "inspect", "c"], "'c' is not the value of a flag"),
        ("run", ["--datasets", "mine.csv"], "there is no dataset 'mine.csv'"),
        ("run", ["--datasets", "mine.csv"], "for your own table use --dataset_file mine.csv"),
        ("run", ["--layers"], "argument --layers: expected one argument"),
        ("run", ["--output_directory="], "argument --output_directory: the path is empty"),
        ("run", ["--cache_dir", ""], "argument --cache_dir: the path is empty"),
        ("report", ["--csv="], "argument --csv: the path is empty"),
        ("run", ["--whole_tokens", "few"], "argument --whole_tokens: 'few' is neither a whole number nor all"),
    ],
)
def test_errors_for_stray_values_and_missing_values(command, words, told, capsys):
    assert program(command)(words, COMMANDS[command].file) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


@pytest.mark.parametrize("field", ["shuffle_select_n", "whole_tokens"])
def test_a_number_accepts_the_word_that_the_help_shows_for_none(field):
    request = make_request(parse_values([f"--{field}", "all"]))
    assert getattr(request.settings, field) is None
    assert getattr(Settings(**{field: "all"}), field) is None


class Stream(io.StringIO):
    def __init__(self, terminal=False):
        super().__init__()
        self._terminal = terminal

    def isatty(self):
        return self._terminal


def drawn(monkeypatch, terminal, seconds_a_step, steps=1000):
    """Return the output of a progress bar of this many steps."""
    stream, now = Stream(terminal), [0.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    with bars.open_bar(steps, "texts", "text") as bar:
        for _ in range(steps):
            now[0] += seconds_a_step
            bar.set_postfix_str("queue 3 MB", refresh=False)
            bar.update(1)
    return stream.getvalue()


def test_a_bar_in_a_file_is_a_few_lines(monkeypatch):
    quick = drawn(monkeypatch, False, 0.001)
    assert quick == "texts: 1000 of 1000, 1 s, queue 3 MB\n"
    slow = drawn(monkeypatch, False, 30).splitlines()
    assert len(slow) == 10 and slow[0].startswith("texts: 100 of 1000, 3000 s") and "1000 of 1000" in slow[-1]
    assert "\r" not in "".join(slow) and "\x1b" not in "".join(slow)
    few = drawn(monkeypatch, False, 1, steps=25).splitlines()
    assert [line.split(",")[0] for line in few] == ["texts: 10 of 25", "texts: 20 of 25", "texts: 25 of 25"]
    assert "\r" in drawn(monkeypatch, True, 0.001), "on a terminal one line is drawn anew"


@pytest.fixture
def asked(tiny_model, tiny_saes, people_csv, tmp_path):
    request = Request(tiny_model, (tiny_saes,), people_csv, tmp_path / "my out").plus("--layers", "1")
    return [word for word in request.argv if word != "--quiet"]


def test_the_last_line_of_a_run_says_how_to_view_the_results(asked, tmp_path, capsys):
    assert main.main(asked) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == (
        f"results in {tmp_path / 'my out'}; for an HTML page: python report.py '{tmp_path / 'my out'}' -o report.html"
    )
    lines = [line for line in told.err.splitlines() if not line.startswith("WARNING")]
    assert re.fullmatch(r"\d+ texts, 1 probe, 1 SAE, 1 layer: loading .*pythia-tiny on cpu", lines[0]), lines
    assert len(lines) == 3 and [line.split(":")[0] for line in sorted(lines[1:])] == ["probes", "texts"]
    assert main.main([*asked, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert scale.main(asked, "delta-selectivity scale") == 0
    end = capsys.readouterr().out.splitlines()[-1]
    assert end.endswith(f"delta-selectivity report '{tmp_path / 'my out'}' -o report.html")


def test_a_terminal_shows_a_status_before_loading(asked, monkeypatch, capsys):
    stream = Stream(terminal=True)
    monkeypatch.setattr(sys, "stderr", stream)
    assert main.main([*asked, "--hookpoint", "nowhere"]) == 2
    assert stream.getvalue().splitlines()[0] == "loading libraries, texts and configs"


def test_a_removed_folder_is_reported_as_missing(asked, tmp_path, monkeypatch, capsys):
    def remove(*_):
        shutil.rmtree(tmp_path / "my out")
        raise OSError("disk on fire")

    monkeypatch.setattr("delta_selectivity.run.evaluation.measure", remove)
    assert main.main([*asked, "--quiet"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"the folder {tmp_path / 'my out'} does not exist" in line and guard.RESUMES not in line


@pytest.mark.parametrize("job", [["inspect"], ["--list_datasets"]])
def test_a_command_without_results_promises_none_when_interrupted(job, asked, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("delta_selectivity.cli.main.show", interrupted)
    assert main.main([*job, *asked]) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"interrupted: {guard.NOTHING_WRITTEN}"


def test_system_exit_in_a_thread_is_a_failure(asked, monkeypatch, capsys):
    from delta_selectivity.run.activations import Producer

    monkeypatch.setattr(Producer, "run", lambda *_: sys.exit(0))
    assert main.main([*asked, "--quiet"]) == 1
    assert "called exit" in capsys.readouterr().err


def test_large_finite_numbers_are_not_reported_as_nan(tiny_model, tmp_path, people_csv, capsys):
    from safetensors.torch import load_file, save_file

    saes = write_sparsify(tmp_path / "large", [1])
    weights = load_file(saes / "layers.1" / "sae.safetensors")
    save_file({**weights, "b_dec": weights["b_dec"] + 1e30}, saes / "layers.1" / "sae.safetensors")
    request = Request(tiny_model, (saes,), people_csv, tmp_path / "out").plus("--layers", "1", "--force")
    assert request.run() == 1
    assert "NaN, Inf or values beyond 1e19, whose squares are Inf in float32" in capsys.readouterr().err


def test_the_metric_of_a_file_of_rows_as_csv(tmp_path, capsys):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)).astype(np.float32)
    labels = x[:, 0] > 0
    path = tmp_path / "rows.npz"
    np.savez(path, x=x, recon=x * 0.5, labels=labels, groups=np.arange(60))
    flags = ["--device2", "cpu", "--folds", "3", "--repeats", "2"]
    assert probe.main([str(path), *flags, "-o", str(tmp_path / "x.csv")]) == 0
    assert probe.main([str(path), *flags, "-o", str(tmp_path / "x.json")]) == 0
    (line,) = csv.DictReader((tmp_path / "x.csv").open(encoding="utf-8"))
    found = json.loads((tmp_path / "x.json").read_text())["reconstruction"]
    record = found[line["probe"]]
    assert line["sae"] == "reconstruction"
    assert float(line["delta_sel"]) == record["delta_sel"] and float(line["fvu_pos"]) == found["fvu_pos"]
    capsys.readouterr()
    assert probe.main([str(path), "-o", str(tmp_path / "x.txt")]) == 2
    assert "give a .json or a .csv file" in capsys.readouterr().err
    np.savez(path, x=x[:4], recon=x[:4], labels=np.array([False, True, False, True]), groups=np.arange(4))
    assert probe.main([str(path)]) == 2
    assert "none of the probes can be measured" in capsys.readouterr().err


def test_evaluate_accepts_tasks_separated_by_commas():
    from delta_selectivity.api.arguments import as_tasks

    assert as_tasks("gender, politics") == ("gender", "politics")
    assert as_tasks("gender") == ("gender",)
    with pytest.raises(RequestError, match="there is no task 'politcs'"):
        as_tasks("gender,politcs")


def test_a_page_that_cannot_be_written_names_its_flag(capsys):
    demo, page = ROOT / "results" / "demo", Path("/proc/nowhere/x.html")
    assert program("report")([str(demo), "-o", str(page)], "report.py") == 2
    assert capsys.readouterr().err.startswith(f"error: --output {page}: cannot be written")
    from delta_selectivity import Results

    with pytest.raises(RequestError, match=f"`path` {page}: cannot be written"):
        Results.load(demo).report(page)


def test_a_path_with_a_comma_is_one_task(tmp_path):
    from delta_selectivity.api.arguments import as_tasks

    path = write_csv(tmp_path / "a,b.csv", people(20))
    (task,) = as_tasks(str(path))
    assert task.path_or_name == str(path)


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "＝", "＋", "－", "＠", " =", "  ＝"])
def test_csv_cells_are_not_read_as_formulas(first):
    ((_,), (cell,)) = csv.reader(io.StringIO(csv_text(["name"], [[f"{first}1+1"]])))
    assert cell == f"'{first}1+1"
    assert csv_text(["n"], [[-1.5]]) == "n\n-1.5\n", "a number stays one"


def test_tasks_that_differ_in_spaces_stay_separate(tmp_path):
    rows = [{"text": f"I saw {name}", "label": i % 2, "task": "=1+1"} for i, name in enumerate(["Paris", "Rome"])]
    assert [p.name for s in load_task(write_csv(tmp_path / "a.csv", rows)).row_sets for p in s.probes] == ["=1+1"]
    for other in (" =1+1", "\t=1+1"):
        with pytest.raises(RequestError, match=r"line 4: tasks .* differ in spaces only: use one spelling"):
            load_task(write_csv(tmp_path / "a.csv", [*rows, {**rows[0], "text": "I saw Bonn", "task": other}]))


def test_a_misspelt_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    write_sparsify(tmp_path / "runs" / "topk" / "trainer_0", [1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("delta_selectivity.saes.HubRepository.open", lambda *_: pytest.fail("the Hub was asked"))
    for name, message in [
        ("runs/topk/trainer_1", "there is no trainer_1 in .*/runs/topk: did you mean .*/runs/topk/trainer_0"),
        ("runs/top/trainer_0", "there is no top in .*/runs: did you mean .*/runs/topk"),
        ("runs/other/x", "there is no other in .*/runs$"),
        ("run", "there is no run in .*: did you mean .*/runs"),
    ]:
        with pytest.raises(RequestError, match=message):
            open_sae(name)


def test_notes_are_not_logged_as_warnings(asked, caplog):
    assert main.main([*asked, "--quiet"]) == 0
    caplog.clear()
    assert main.main([*asked, "--quiet"]) == 0
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("NOTE", "all requested results are on disk already")
    ]
