"""Sweep files: the requests that they describe, and errors before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from delta_selectivity.cli import scale
from delta_selectivity.cli.command_line import make_request
from delta_selectivity.cli.sweep import Sweep
from delta_selectivity.errors import RequestError


@pytest.fixture
def read(tmp_path):
    def call(text: str) -> Sweep:
        path = tmp_path / "sweep.toml"
        path.write_text(text, encoding="utf-8")
        return Sweep.read(path)

    return call


GRID = """
output_directory = "out"
[flags]
folds = 3
baselines = true
datasets = ["gender", "politics"]
[[grid]]
sae_name = [["assets/tiny-pythia-saes-k8", "assets/tiny-pythia-saes-k32"], "assets/tiny-pythia-saes-k8"]
layers = ["0-2", 3]
"""


def test_a_grid_is_every_combination_with_a_folder_each(read):
    requests = [make_request(values) for values in read(GRID).requests]
    found = [([name[-2:] for name in request.saes], request.layers) for request in requests]
    assert found == [(["k8", "32"], (0, 1, 2)), (["k8", "32"], (3,)), (["k8"], (0, 1, 2)), (["k8"], (3,))]
    assert {(r.settings.folds, r.tasks, len(r.settings.baselines)) for r in requests} == {
        (3, ("gender", "politics"), 6)
    }
    folders = [str(request.output) for request in requests]
    assert folders[3] == "out/sae_name_tiny-pythia-saes-k8__layers_3"
    assert len(set(folders)) == 4


def test_grids_are_combined_and_override_flags(read):
    sweep = read('output_directory = "o"\n[flags]\nseed = 1\n[[grid]]\nlayers = "0"\n[[grid]]\nseed = [2, 3]\n')
    requests = [make_request(values) for values in sweep.requests]
    assert [request.settings.seed for request in requests] == [1, 2, 3]
    assert [str(request.output) for request in requests] == ["o/seed_1__layers_0", "o/seed_2", "o/seed_3"]


def test_a_single_request_has_a_folder(read):
    assert read('output_directory = "o"\n[[grid]]\nseed = 5\n').requests == (
        {"seed": 5, "output_directory": Path("o/all")},
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("output_directory = ", "not a TOML file"),
        ('[[grid]]\nseed = 1\n', "output_directory must be"),
        ('output_directory = "o"\n', "[[grid]]"),
        ('output_directory = "o"\ngrids = 1\n', "output_directory, page, flags, grid"),
        ('output_directory = "o"\n[[grid]]\nsaename = "a"\n', "unknown key grid.saename: use model_name"),
        ('output_directory = "o"\n[flags]\noverwrite = true\n[[grid]]\nseed = 1\n', "unknown key flags.overwrite"),
        ('output_directory = "o"\n[[grid]]\nseed = []\n', "grid.seed is an empty list"),
        ('output_directory = "o"\n[[grid]]\nseed = [1, 1]\n', "two requests"),
        ('output_directory = "o"\n[[grid]]\nseed = [{a = 1}]\n', "seed = {'a': 1}"),
        ('output_directory = "o"\nflags = 3\n[[grid]]\nseed = 1\n', "flags must be a table"),
    ],
)  # fmt: skip
def test_invalid_sweeps_are_rejected_with_the_reason(read, text, words):
    with pytest.raises(RequestError) as refused:
        read(text)
    assert words in str(refused.value)


def test_every_request_is_checked_before_the_first_begins(
    tiny_model, tiny_saes, people_csv, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("delta_selectivity.scale.spread.open_files", lambda *a: pytest.fail("a request began"))
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(f"""
        output_directory = "{tmp_path / "out"}"
        [flags]
        model_name = "{tiny_model}"
        sae_name = "{tiny_saes}"
        dataset_file = "{people_csv}"
        [[grid]]
        layers = ["0", "7"]
    """)
    assert scale.main(["--config", str(sweep)]) == 2
    assert "--layers 7" in capsys.readouterr().err


def test_a_sweep_is_measured_summarised_and_not_repeated(tiny_model, tiny_saes, people_csv, tmp_path, capsys, caplog):
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(f"""
        output_directory = "{tmp_path / "out"}"
        page = "page.html"
        [flags]
        model_name = "{tiny_model}"
        sae_name = "{tiny_saes}"
        dataset_file = "{people_csv}"
        repeats = 2
        device1 = "cpu"
        device2 = "cpu"
        [[grid]]
        layers = [0, 1]
        positions = "mean"
    """)
    argv = ["--config", str(sweep), "--workers", "1"]
    assert scale.main(argv) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("## layers")] == ["## layers_0", "## layers_1"]
    assert shown.count("| sae-tiny") == 2, "a line for each request"
    assert all((tmp_path / "out" / name / "page.html").stat().st_size > 1000 for name in ("layers_0", "layers_1"))
    found = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").glob("**/*.json"))
    assert [str(path.parent) for path in found] == ["layers_0", "layers_1"]
    assert scale.main(argv) == 0
    assert "on disk already" in caplog.text
