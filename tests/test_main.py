"""The program as it is used: in process, on a tiny model, with its files, exit codes and one-line errors."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import people, write_csv, write_identity, write_sparsify
from safetensors.torch import load_file, save_file

from delta_selectivity.cli import main as program
from delta_selectivity.cli import report

CELL_KEYS = {"model_sel", "sae_sel", "delta_sel", "ci_low", "ci_high", "p_value", "q_value", "transfer_sel", "n_people"}
LAYER_KEYS = {"mse_pos", "mse_whole", "fvu_pos", "l0", "l1"}
RUN_KEYS = {"schema_version", "config", "versions", "commit", "started", "seconds", "complete"}


@pytest.fixture
def ask(tiny_model, tiny_saes, people_csv, tmp_path):
    """Return a function that calls the program on the tiny model with a CSV task; its arguments are further flags."""

    def call(*flags, sae=tiny_saes, out=tmp_path / "results", data=("--dataset_file", str(people_csv))):
        fixed = ["--model_name", str(tiny_model), "--sae_name", str(sae), "--output_directory", str(out), "--quiet"]
        return program.main([*fixed, *data, "--device1", "cpu", "--device2", "cpu", "--repeats", "2", *flags])

    return call


def results(path):
    return json.loads(path.read_text())


def numbers(path):
    return {name: value for name, value in results(path).items() if name != "_run"}


def cell_of(layer):
    """Return the only probe of a layer's record."""
    (cell,) = (value for value in layer.values() if isinstance(value, dict))
    return cell


def test_the_command_of_the_contract_writes_the_promised_files_and_keys(tiny_model, tmp_path, monkeypatch, capsys):
    hub = tmp_path / "EleutherAI"
    shutil.copytree(tiny_model, hub / "pythia-160m")
    write_sparsify(hub / "sae-pythia-160m-32k")
    monkeypatch.chdir(tmp_path)
    flags = """--model_name EleutherAI/pythia-160m --sae_name EleutherAI/sae-pythia-160m-32k --datasets 0,1,2,3,4
        --layers 0,1 --output_directory ./results --device1 cpu --device2 cpu --batch_size 256
        --shuffle_select_n 120 --repeats 2"""
    assert program.main(flags.split()) == 0
    probes = {
        "gender": {"gender"},
        "occupation": {"is_actor", "is_journalist", "is_politician", "is_researcher", "is_singer"},
        "politics": {"politics"},
        "athlete": {"is_athlete", "plays_football", "plays_basketball", "plays_baseball"},
        "is_alive": {"is_alive"},
    }
    assert {p.name for p in (tmp_path / "results").glob("*.json")} == {
        f"EleutherAI_pythia-160m_wikidata_{name}.json" for name in probes
    }
    assert {p.name for p in (tmp_path / "results").iterdir() if p.suffix != ".json"} == {
        f"EleutherAI_pythia-160m_wikidata_{name}.scores" for name in probes
    }
    for dataset, names in probes.items():
        found = results(tmp_path / "results" / f"EleutherAI_pythia-160m_wikidata_{dataset}.json")
        assert list(found) == ["layer_0", "layer_1", "_run"]
        assert found["_run"].keys() >= RUN_KEYS
        assert found["_run"]["complete"] is True
        for layer in ("layer_0", "layer_1"):
            assert found[layer].keys() >= LAYER_KEYS
            assert {name for name, value in found[layer].items() if isinstance(value, dict)} == names
            assert all(found[layer][name].keys() >= CELL_KEYS for name in names)
    shown = capsys.readouterr().out
    assert "EleutherAI_pythia-160m_wikidata_gender.json" in shown
    assert "plays_baseball" in shown


def test_numbers_are_consistent_and_the_easy_concept_is_found(ask, tmp_path):
    assert ask("--positions", "mean") == 0
    found = numbers(tmp_path / "results" / "pythia-tiny_women.json")
    assert list(found) == ["layer_0", "layer_1", "layer_2"]
    for layer in found.values():
        cell = cell_of(layer)
        assert cell["model_sel"] > 0.7, "the first name gives the label away"
        assert cell["delta_sel"] == pytest.approx(cell["sae_sel"] - cell["model_sel"])
        assert cell["ci_low"] <= cell["delta_sel"] <= cell["ci_high"]
        assert cell["n_rows"] >= cell["n_people"] > 50
        assert 0 < layer["l0"] <= 8
        assert layer["mse_pos"] > 0


def test_identity_sae_loses_exactly_nothing(ask, tmp_path):
    assert ask(sae=write_identity(tmp_path / "identity")) == 0
    for layer in numbers(tmp_path / "results" / "pythia-tiny_women.json").values():
        assert layer["mse_pos"] == layer["mse_whole"] == layer["fvu_pos"] == 0
        cell = cell_of(layer)
        assert cell["delta_sel"] == 0
        assert cell["transfer_sel"] == cell["model_sel"]
        assert (cell["ci_low"], cell["ci_high"], cell["p_value"]) == (0, 0, 1)


@pytest.mark.parametrize("positions", ["mean", "all"])
def test_identity_loses_nothing_at_other_positions(ask, tmp_path, positions):
    assert ask("--positions", positions, sae=write_identity(tmp_path / "identity")) == 0
    for layer in numbers(tmp_path / "results" / "pythia-tiny_women.json").values():
        cell = cell_of(layer)
        assert cell["delta_sel"] == 0
        assert cell["n_rows"] >= cell["n_people"]


def test_several_saes_share_a_run_and_each_equals_its_own(ask, tiny_saes, tmp_path):
    other = write_sparsify(tmp_path / "sae-sparser", k=2)
    assert ask(sae=f"{tiny_saes},{other}", out=tmp_path / "both") == 0
    for sae in (tiny_saes, other):
        assert ask(sae=sae, out=tmp_path / sae.name) == 0
        together = numbers(tmp_path / "both" / sae.name / "pythia-tiny_women.json")
        assert together == numbers(tmp_path / sae.name / "pythia-tiny_women.json")


def test_batch_size_changes_no_number(ask, tmp_path):
    assert ask(out=tmp_path / "a") == 0
    assert ask("--batch_size", "7", out=tmp_path / "b") == 0
    a, b = (numbers(tmp_path / name / "pythia-tiny_women.json") for name in "ab")
    for layer in a:
        for key, value in a[layer].items():
            if not isinstance(value, dict):
                assert b[layer][key] == pytest.approx(value, rel=1e-5)
            else:
                assert b[layer][key]["model_sel"] == pytest.approx(value["model_sel"], abs=1e-6)


def test_a_finished_run_is_not_repeated(ask, tmp_path):
    assert ask() == 0
    path = tmp_path / "results" / "pythia-tiny_women.json"
    before, when = path.read_bytes(), path.stat().st_mtime_ns
    assert ask() == 0
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, when)


def test_missing_layers_are_added(ask, tmp_path):
    assert ask("--layers", "1") == 0
    assert ask() == 0
    assert ask(out=tmp_path / "whole") == 0
    name = "pythia-tiny_women.json"
    assert numbers(tmp_path / "results" / name) == numbers(tmp_path / "whole" / name)


def test_results_of_other_settings_need_overwrite(ask, tmp_path, capsys):
    assert ask() == 0
    path = tmp_path / "results" / "pythia-tiny_women.json"
    before = path.read_bytes()
    assert ask("--seed", "1") == 2
    assert "--seed 0 there, 1 now" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert ask("--seed", "1", "--overwrite") == 0
    assert path.read_bytes() != before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--datasets", "999"], "999"),
        (["--datasets", "height"], "height"),
        (["--layers", "7"], "layer"),
        (["--layers", "2-1"], "is descending"),
        (["--layers", "first"], "first"),
        (["--device1", "cuda:17"], "CUDA"),
        (["--device2", "tpu"], "tpu"),
        (["--positions", "middle"], "middle"),
        (["--probe", "forest"], "forest"),
        (["--probe", "cuml"], "delta-selectivity[gpu]"),
        (["--folds", "1"], "folds"),
        (["--batch_size", "0"], "batch_size"),
        (["--batch_size", "many"], "many"),
        (["--shuffle_select_n", "-1"], "shuffle_select_n"),
        (["--queue_gb", "0"], "queue_gb"),
        (["--no_such_flag"], "no_such_flag"),
        (["--model_name", "no/such/model"], "no/such/model"),
        (["--sae_name", "/no/such/sae"], "/no/such/sae"),
        (["--dataset_file", "/no/such/file.csv"], "/no/such/file.csv"),
        (["--dtype", "int8"], "int8"),
        (["--views", "model,dream"], "dream"),
        (["--output_directory", "/proc/results"], "/proc/results"),
    ],
)
def test_an_invalid_request_fails_before_loading(ask, tmp_path, capsys, monkeypatch, flags, words):
    from delta_selectivity.models import language_model

    monkeypatch.setattr(language_model.ModelInfo, "load", lambda *a: pytest.fail("the model was loaded"))
    data = () if "--datasets" in flags else ("--dataset_file", str(tmp_path / "women.csv"))
    assert ask(*flags, data=data) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    assert err[0].startswith("error: ")
    assert words in err[0]
    assert not list(tmp_path.glob("results/**/*.json"))


def test_an_sae_of_another_width_is_refused(ask, tmp_path, capsys):
    assert ask(sae=write_sparsify(tmp_path / "wide", d_in=48)) == 2
    assert "d_in is 48" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{**row, "label": 1} for row in people(50)], "class"),
        ([{**row, "text": "  "} if i == 3 else row for i, row in enumerate(people(50))], "5"),
        ([{"sentence": "Maria", "label": 1}], "text"),
    ],
    ids=["one class", "no tokens", "no text column"],
)
def test_an_unusable_task_is_rejected(ask, tmp_path, capsys, rows, words):
    path = write_csv(tmp_path / "bad.csv", rows)
    assert ask(data=("--dataset_file", str(path))) == 2
    assert words in capsys.readouterr().err


def few_people():
    """Return rows of many men and of two women."""
    return [row for row in people(120) if row["label"] == 0] + [
        {**row, "group": f"only {i % 2}"} for i, row in enumerate(people(40)) if row["label"] == 1
    ]


def test_a_class_with_fewer_people_than_folds_gets_a_reason(ask, tmp_path, caplog):
    rows = [{**row, "task": "few"} for row in few_people()] + [{**row, "task": "enough"} for row in people(120)]
    assert ask(data=("--dataset_file", str(write_csv(tmp_path / "few.csv", rows)))) == 0
    found = results(tmp_path / "results" / "pythia-tiny_few.json")
    assert found["layer_0"]["enough"]["delta_sel"] is not None
    cell = found["layer_0"]["few"]
    assert "1 group" in cell["reason"]
    assert cell["delta_sel"] is None
    assert any("not measured" in line for line in found["_run"]["warnings"])


@pytest.mark.parametrize("rows", [people(4), few_people()], ids=["four rows", "two people"])
def test_a_request_without_measurable_probes_is_invalid(ask, tmp_path, capsys, rows):
    """The result must not be an empty table and exit code 0."""
    assert ask(data=("--dataset_file", str(write_csv(tmp_path / "few.csv", rows)))) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "none of the probes can be measured (few: the" in line and "--folds" in line
    assert "--datasets" not in line, "the task came from --dataset_file"
    assert not (tmp_path / "results").exists()


def test_nan_in_the_model_fails_the_run_and_names_the_layer(tiny_model, ask, tmp_path, capsys):
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = load_file(str(broken / "model.safetensors"))
    weights["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"][0] = float("nan")
    save_file(weights, str(broken / "model.safetensors"), metadata={"format": "pt"})
    assert ask("--model_name", str(broken)) == 1
    assert "layer 1" in capsys.readouterr().err.strip().splitlines()[-1]


def test_list_datasets_prints_the_table_and_loads_nothing(capsys):
    assert program.main(["--list_datasets"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("gender", "occupation", "politics", "athlete", "is_alive", "3345"))


def test_the_report_prints_every_cell_and_the_worst_first_on_request(ask, tmp_path, capsys):
    assert ask() == 0
    assert report.main([str(tmp_path / "results"), "--worst_first"]) == 0
    table = capsys.readouterr().out
    cells = [line for line in table.splitlines() if line.startswith(("| 0", "| 1", "| 2"))]
    deltas = [float(line.split("|")[5].strip(" *")) for line in cells]
    assert len(deltas) == 3
    assert deltas == sorted(deltas)
    assert report.main([str(tmp_path / "results"), "--resources"]) == 0
    assert "forward" in capsys.readouterr().out
    assert report.main([str(tmp_path / "nothing")]) == 2


def test_a_resumed_run_over_datasets_that_share_texts_equals_an_undisturbed_one(ask, tmp_path):
    data = ("--datasets", "gender,is_alive", "--shuffle_select_n", "60", "--layers", "1")
    assert ask(data=data, out=tmp_path / "whole") == 0
    assert ask(data=data) == 0
    names = [f"pythia-tiny_wikidata_{name}.json" for name in ("gender", "is_alive")]
    (tmp_path / "results" / names[1]).unlink()
    assert ask(data=data) == 0
    for name in names:
        assert numbers(tmp_path / "results" / name) == numbers(tmp_path / "whole" / name)


@pytest.mark.parametrize(
    ("flag", "meant"), [("--layer", "--layers"), ("--lyers", "--layers"), ("--sae_nam", "--sae_name")]
)
def test_a_misspelt_flag_is_named_with_the_one_that_is_meant(capsys, flag, meant):
    assert program.main([flag, "3"]) == 2
    assert capsys.readouterr().err == f"error: unknown flag {flag}: did you mean {meant}? (see --help)\n"


def test_errors_of_readers_do_not_mention_overwrite(tmp_path, capsys):
    (tmp_path / "page.html").write_text("<p>")
    assert report.main([str(tmp_path / "page.html")]) == 2
    told = capsys.readouterr().err
    assert "not a result file" in told
    assert "overwrite" not in told
