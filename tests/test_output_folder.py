"""Several SAEs in one output folder: from several runs, with equal names, with other settings."""

from __future__ import annotations

import csv
import json

import pytest
from conftest import people, write_csv, write_sparsify
from runs import Request, files, numbers, scores_of

import delta_selectivity as ds
from delta_selectivity.cli import extract, probe, report, scale
from delta_selectivity.errors import RequestError
from delta_selectivity.records import result_file
from delta_selectivity.records.differences import differences
from delta_selectivity.records.rows_file import load
from delta_selectivity.saes.names import expand_names, split_alias
from delta_selectivity.system.comma_lists import join_names, parse_names

FAST = ds.Settings(folds=3, repeats=1)
MODEL = "EleutherAI_pythia-tiny"


@pytest.fixture
def ask(tiny_model, tiny_saes, people_csv, tmp_path):
    """Return a function that runs the given SAEs, with layer 1 only, into `tmp_path / "out"`."""

    def run(*saes, flags=(), data=people_csv):
        request = Request(tiny_model, saes or (tiny_saes,), data, tmp_path / "out").plus("--layers", "1", *flags)
        return request.run()

    return run


def relative(folder):
    return sorted(str(path.relative_to(folder)) for path in files(folder))


@pytest.fixture
def trainers(tmp_path):
    """Create three SAEs whose last folder has the same name."""
    return tuple(write_sparsify(tmp_path / name / "trainer_0", [1], k=k) for name, k in (("a", 4), ("b", 8), ("c", 16)))


def test_another_sae_gets_its_own_folder(ask, tiny_saes, other_saes, tmp_path, caplog):
    out = tmp_path / "out"
    assert ask(tiny_saes) == 0
    assert "holds the results" not in caplog.text
    first = {path: path.read_bytes() for path in files(out)}
    assert ask(other_saes) == 0
    told = [record for record in caplog.records if "already holds results of" in record.getMessage()]
    assert len(told) == 1 and str(out / "sae-other") in told[0].getMessage() and told[0].levelname == "NOTE"
    assert relative(out) == ["pythia-tiny_women.json", "sae-other/pythia-tiny_women.json"]
    assert all(path.read_bytes() == content for path, content in first.items()), "nothing of the first is touched"

    for saes in (tiny_saes, other_saes):  # each is resumed in its folder
        before = {path: path.read_bytes() for path in files(out)}
        assert ask(saes) == 0
        assert caplog.messages[-1] == "all requested results are on disk already"
        assert {path: path.read_bytes() for path in files(out)} == before
    assert ask(other_saes, flags=["--overwrite"]) == 0
    assert all(path.read_bytes() == content for path, content in first.items()), "not even when told to overwrite"

    assert ask(tiny_saes, other_saes) == 0, "both at once: nothing is measured again, and they are compared"
    assert len(files(out)) == 2
    compared = [list(result_file.read(path)["_run"]["sae_level"]["compared"]) for path in files(out)]
    assert compared == [[str(other_saes)], [str(tiny_saes)]]


def test_folders_of_a_run_of_two_saes(ask, tiny_saes, other_saes, tmp_path):
    assert ask(tiny_saes, other_saes) == 0
    both = relative(tmp_path / "out")
    assert both == ["sae-other/pythia-tiny_women.json", "sae-tiny/pythia-tiny_women.json"]
    before = numbers(tmp_path / "out")
    assert ask(other_saes) == 0, "one of them alone goes on where it lies"
    assert numbers(tmp_path / "out").keys() == before.keys()


def test_a_single_sae_uses_the_folder_despite_files_of_other_models(tmp_path):
    run = result_file.describe_run({"sae": "/x/a", "sae_label": "a", "model_name": "one"})
    result_file.RecordFile.open(tmp_path / "one_t.json", {"sae": "1"}, run, overwrite=False).write({})
    from delta_selectivity.records.result_folder import choose_folder

    other = result_file.describe_run({"sae": "/x/b", "sae_label": "b", "model_name": "two"})
    assert choose_folder(tmp_path, tmp_path, other, {"two_t.json": {"sae": "2"}}) == tmp_path
    same_model = result_file.describe_run({"sae": "/x/b", "sae_label": "b", "model_name": "one"})
    assert choose_folder(tmp_path, tmp_path, same_model, {"one_u.json": {"sae": "2"}}) == tmp_path / "b"
    moved = result_file.describe_run({"sae": "/y/a", "sae_label": "a", "model_name": "one"})
    assert choose_folder(tmp_path, tmp_path, moved, {"one_t.json": {"sae": "1"}}) == tmp_path, "the same weights"


def test_three_saes_with_the_same_folder_name(ask, trainers, tmp_path):
    for sae in trainers:
        assert ask(sae) == 0
    parts = [path.rpartition("/")[0] for path in relative(tmp_path / "out")]
    assert sorted(parts) == ["", "c_trainer_0", "trainer_0"]
    saes = {result_file.read(path)["_run"]["config"]["sae"] for path in files(tmp_path / "out")}
    assert saes == set(map(str, trainers))
    before = {path: path.read_bytes() for path in files(tmp_path / "out")}
    for sae in trainers:
        assert ask(sae) == 0
    assert {path: path.read_bytes() for path in files(tmp_path / "out")} == before


def test_evaluate_and_many_workers_choose_the_same_folders(
    ask, tiny_model, tiny_saes, other_saes, people_csv, tmp_path
):
    out = tmp_path / "out"
    assert ask(tiny_saes) == 0
    first = {path: path.read_bytes() for path in files(out)}
    asked = {"layers": 1, "settings": FAST, "device": "cpu", "output": out}
    found = ds.evaluate(tiny_model, other_saes, people_csv, **asked)
    assert found.saes == [str(other_saes)]
    assert [path for path, _ in found.files] == [out / "sae-other" / "pythia-tiny_women.json"]
    scores = scores_of(out)
    argv = Request(tiny_model, (other_saes,), people_csv, out).plus("--layers", "1").argv
    assert scale.main([*argv, "--workers", "1"]) == 0, "it finds everything there"
    assert scores_of(out) == scores
    assert all(path.read_bytes() == content for path, content in first.items())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--shuffle_select_n", "200"], "--shuffle_select_n all there, 200 now"),
        (["--seed", "3"], "--seed 0 there, 3 now"),
        (["--bos", "none"], "--bos auto there, none now"),
        (["--views", "error"], "--views model,sae there, model,sae,error now"),
        (["--epsilon", "0.05"], "--epsilon 0.02 there, 0.05 now"),
        (["--dtype", "bfloat16"], "--dtype auto there, bfloat16 now"),
    ],
)
def test_errors_name_the_differing_flag(ask, tmp_path, capsys, flags, told):
    assert ask() == 0
    capsys.readouterr()
    assert ask(flags=flags) == 2
    line = capsys.readouterr().err.strip()
    assert told in line and "\n" not in line and "--overwrite" in line, line
    assert not any(len(word) > 11 and set(word) <= set("0123456789abcdef…") for word in line.split()), "a hash"


def test_a_changed_file_is_reported(ask, people_csv, tiny_model, tmp_path, capsys):
    saes = write_sparsify(tmp_path / "mine", [1])
    assert ask(saes) == 0
    write_csv(people_csv, people(200))
    assert ask(saes) == 2
    assert f"the rows of {people_csv} have changed since" in capsys.readouterr().err
    write_csv(people_csv, people(240))
    config = json.loads((saes / "layers.1" / "cfg.json").read_text())
    (saes / "layers.1" / "cfg.json").write_text(json.dumps({**config, "k": 4}))
    assert ask(saes) == 2
    assert f"weights or config of the SAE {saes} have changed since" in capsys.readouterr().err


def test_every_difference_of_a_key_is_described(ask, tmp_path):
    """Every difference is reported, without hashes, even if no setting explains it."""
    assert ask(flags=["--baselines", "random,mean"]) == 0
    for path in files(tmp_path / "out"):
        run = result_file.read(path)["_run"]
        for name, value in run["key"].items():
            other = {"key": {**run["key"], name: "f" * 64 if isinstance(value, str) else -1}, "config": run["config"]}
            (line,) = differences(run, other)
            assert str(value) not in line or len(str(value)) < 20, line
    there = {"key": {"data": "a", "seed": 0}, "config": {"seed": 0, "shuffle_select_n": 300}}
    now = {"key": {"data": "b", "seed": 1}, "config": {"seed": 1, "shuffle_select_n": 500}}
    assert sorted(differences(there, now)) == ["`seed` 0 there, 1 now", "`shuffle_select_n` 300 there, 500 now"]


def test_every_program_gives_saes_the_same_distinct_names(ask, trainers, tiny_model, people_csv, tmp_path, capsys):
    out, names = tmp_path / "out", ["a_trainer_0", "b_trainer_0", "c_trainer_0"]
    assert ask(*trainers, flags=["--baselines", "random"]) == 0
    assert sorted(path.parent.name for path in files(out) if "baselines" not in path.parts) == names
    found = ds.Results.load(out)
    assert found.saes[:3] == list(map(str, trainers))
    assert found.compare(names[0], names[2]).a == names[0]
    from delta_selectivity.reporting.study import study_of

    study = study_of(found.files)
    assert [sae.label for sae in study.saes] == names
    assert [[b.belongs_to(sae) for sae in study.saes].index(True) for b in study.baselines] == [0, 1, 2]

    rows = tmp_path / "rows.safetensors"
    argv = Request(tiny_model, trainers, people_csv, out).plus("--layers", "1").argv
    without = [word for word in argv if word not in ("--device2", "--output_directory", str(out))]
    without.remove("cpu")
    assert extract.main([*without, "-o", str(rows)]) == 0
    assert list(load(rows).recons) == names
    capsys.readouterr()
    assert probe.main([str(rows)]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in names)


def test_every_program_keeps_the_requested_order_of_saes(ask, trainers, tiny_model, people_csv, tmp_path, capsys):
    """The order of folders is alphabetical: b comes before c there."""
    saes = [f"mine={trainers[2]}", str(trainers[1]), str(trainers[0])]
    assert ask(*saes) == 0
    assert ds.Results.load(tmp_path / "out").saes == ["mine", *map(str, trainers[1::-1])]
    assert report.main([str(tmp_path / "out"), "--csv", str(tmp_path / "all.csv")]) == 0
    with (tmp_path / "all.csv").open(encoding="utf-8") as file:
        assert list(dict.fromkeys(line["sae"] for line in csv.DictReader(file))) == ["mine", *map(str, trainers[1::-1])]


def test_workers_know_the_names_of_the_whole_request(ask, trainers, tiny_model, people_csv, tmp_path):
    """A unit has some of the SAEs only, and would name them and their baselines after those alone."""
    assert ask(*trainers, flags=["--baselines", "random"]) == 0
    request = Request(tiny_model, trainers, people_csv, tmp_path / "many").plus(
        "--layers", "1", "--baselines", "random"
    )
    assert scale.main([*request.argv, "--workers", "1", "--saes_per_unit", "1"]) == 0
    assert numbers(tmp_path / "many") == numbers(tmp_path / "out")


def test_given_names_and_commas_in_paths(ask, tiny_model, people_csv, tmp_path):
    odd = write_sparsify(tmp_path / "k=4,lr=1" / "trainer_0", [1], k=4)
    other = write_sparsify(tmp_path / "trainer_0", [1])
    written = join_names([str(odd), f"mine={other}"])
    assert parse_names(written) == [str(odd), f"mine={other}"]
    assert parse_names(r" a , b\,c ,,d=x") == ["a", "b,c", "d=x"]
    assert ask(written) == 0
    found = {path.parent.name: result_file.read(path)["_run"]["config"]["sae"] for path in files(tmp_path / "out")}
    assert found == {"trainer_0": str(odd), "mine": "mine"}
    assert split_alias(str(odd)) == (None, str(odd)), "a path with = is a path"
    assert split_alias("runs/lr=1/x") == (None, "runs/lr=1/x")
    assert expand_names([f"mine={tmp_path}/trainer_?"]) == [f"mine={other}"]
    assert expand_names([str(other), f"{other}/", f"{tmp_path}/./trainer_0", "a/b", "a/b/"]) == [str(other), "a/b"]
    with pytest.raises(RequestError, match="matches 2 SAEs"):
        expand_names([f"mine={_two(tmp_path)}/*"])
    with pytest.raises(RequestError, match="two have the name 'mine'"):
        ds.evaluate(tiny_model, [f"mine={other}", f"mine={tmp_path}/both/x"], people_csv, layers=1, device="cpu")


def _two(folder):
    for name in "xy":
        write_sparsify(folder / "both" / name, [1])
    return folder / "both"
