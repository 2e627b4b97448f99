"""Stored scores: reading returns what was written, and the statistics in the JSON can be recomputed from them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import people, write_csv, write_sparsify
from result_sets import write_changed
from runs import Request, files, numbers
from safetensors import safe_open
from test_probe_statistics import found_scores

from delta_selectivity.errors import RequestError
from delta_selectivity.records import result_file, scores
from delta_selectivity.records.sae_level import difference, mean_delta, read_cells
from delta_selectivity.records.scores import LayerScores, compute, load, save
from delta_selectivity.reporting.results import load as load_files
from delta_selectivity.reporting.results import result_files
from delta_selectivity.reporting.study import study_of


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "m_d.scores" / "layer_3.safetensors"
    with_outliers = replace(found_scores(), outliers=np.arange(400) % 100 == 3)
    probes = {"gender": with_outliers, "odd / näme\n": found_scores(rows=50, repeats=1, weighted=True)}
    save(path, LayerScores(3, "a key", probes))
    return path, probes


def test_scores_are_read_back_unchanged(stored):
    path, probes = stored
    found = load(path)
    assert (found.layer, found.key, list(found.probes)) == (3, "a key", list(probes))
    for name, probe in probes.items():
        for view, values in probe.views.items():
            np.testing.assert_array_equal(found.probes[name].views[view], values)
        for part in ("labels", "persons", "weights", "folds", "outliers"):
            np.testing.assert_array_equal(getattr(found.probes[name], part), getattr(probe, part))
        assert compute(found)[name] == compute(LayerScores(3, "a key", probes))[name]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_file_is_as_documented_and_the_same_each_time(stored, tmp_path):
    path, probes = stored
    with safe_open(path, framework="np") as file:
        assert json.loads(file.metadata()["delta_selectivity"])["probes"] == list(probes)
        assert file.get_tensor("0.view.sae").dtype == np.float16
        assert file.get_tensor("0.persons").shape == (400,)
        assert file.get_tensor("0.outliers").dtype == np.uint8
        assert "1.outliers" not in file.keys()  # noqa: SIM118 - no mapping
    for i in range(5):
        save(tmp_path / f"{i}.scores" / "x", LayerScores(3, "a key", probes))
        assert (tmp_path / f"{i}.scores" / "x").read_bytes() == path.read_bytes()


STRAY = [
    "layer_0 (copy).safetensors", "layer_.safetensors", "layer_00.safetensors", "layer_-1.safetensors",
    "layer_٣.safetensors", f"layer_{'9' * 200}.safetensors", "layer_1.safetensors.bak", ".notes.mine.tmp",
    ".layer_1.safetensors.tmp", "notes.txt",
]  # fmt: skip


def test_only_files_of_this_program_are_removed(tmp_path):
    result, outside = tmp_path / "m_d.json", tmp_path / "outside"
    outside.write_text("mine")
    folder = scores.folder_of(result)
    for layer in (0, 1, 2):
        save(scores.path_of(result, layer), LayerScores(layer, "a key", {"gender": found_scores()}))
    (folder / "layer_5.safetensors").symlink_to(outside)
    (folder / "layer_6.safetensors").mkdir()
    for name in STRAY:
        (folder / name).write_text("mine")
    scores.prune(result, {1})
    save(scores.path_of(result, 3), LayerScores(3, "a key", {"gender": found_scores()}))
    kept = {"layer_1.safetensors", "layer_3.safetensors", "layer_5.safetensors", "layer_6.safetensors", *STRAY}
    assert {path.name for path in folder.iterdir()} == kept
    assert outside.read_text() == "mine"


def test_a_folder_of_scores_that_is_a_link_is_refused(tmp_path):
    result, elsewhere = tmp_path / "m_d.json", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "layer_0.safetensors").write_text("mine")
    scores.folder_of(result).symlink_to(elsewhere)
    with pytest.raises(RequestError, match=r"m_d\.scores is a symbolic link"):
        scores.prune(result, {1})
    with pytest.raises(RequestError, match=r"m_d\.scores is a symbolic link"):
        save(scores.path_of(result, 1), LayerScores(1, "a key", {"gender": found_scores()}))
    assert [path.name for path in elsewhere.iterdir()] == ["layer_0.safetensors"]


def test_a_run_rejects_a_linked_folder_before_measuring(tiny_model, tiny_saes, people_csv, tmp_path, capsys):
    asked = Request(tiny_model, (tiny_saes,), people_csv, tmp_path / "out").plus("--layers", "0", "--overwrite")
    assert asked.run() == 0
    (result,) = files(asked.out)
    stray = scores.folder_of(result) / "layer_0 (copy).safetensors"
    stray.write_text("mine")
    assert asked.run() == 0
    assert stray.read_text() == "mine"
    moved = scores.folder_of(result).rename(tmp_path / "elsewhere")
    scores.folder_of(result).symlink_to(moved)
    before = {path: path.stat() for path in moved.iterdir()}
    capsys.readouterr()
    assert asked.run() == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "is a symbolic link" in line
    assert {path: path.stat() for path in moved.iterdir()} == before


def test_damaged_scores_are_one_line(stored, tmp_path):
    path, _ = stored
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-7], whole.replace(b"0.folds", b"0.foldz"), b"{}" + whole):
        path.write_bytes(damaged)
        with pytest.raises(RequestError, match="layer_3"):
            load(path)
    with pytest.raises(RequestError, match="cannot be read"):
        load(tmp_path / "absent")
    good = found_scores(rows=30)
    bad = {
        "inconsistent shapes": replace(good, labels=good.labels[:9]),
        "unexpected types": replace(good, views={**good.views, "sae": good.views["sae"].astype(np.float32)}),
        "finite": replace(good, weights=good.weights * np.nan),
        "0 and 1": replace(good, labels=good.labels | True),
        "only": replace(good, views={"model": good.views["model"]}),
    }
    for told, probe in bad.items():
        save(path, LayerScores(3, "a key", {"x": probe}))
        with pytest.raises(RequestError, match=told):
            load(path)


@pytest.fixture(scope="module")
def run(tiny_model, tiny_saes, tmp_path_factory):
    """Run two SAEs on two datasets with all views."""
    folder = tmp_path_factory.mktemp("scores")
    data = write_csv(folder / "women.csv", people(150))
    sparser = write_sparsify(folder / "sae-sparser", k=2)
    flags = ("--folds", "3", "--repeats", "2", "--datasets", "politics", "--shuffle_select_n", "80", "--views", "error")
    ask = Request(tiny_model, (tiny_saes, sparser), data, folder / "out", flags)
    assert ask.run() == 0
    return ask


def test_statistics_are_recomputed_from_the_scores(run):
    for path in files(run.out):
        found = result_file.read(path)
        for name in (name for name in found if name.startswith("layer_")):
            again = compute(load(scores.path_of(path, int(name.removeprefix("layer_")))))
            cells = {probe: cell for probe, cell in found[name].items() if isinstance(cell, dict)}
            assert again.keys() == cells.keys()
            for probe, statistic in again.items():
                known = {key: value for key, value in vars(statistic).items() if key in cells[probe]}
                assert known.keys() >= {"delta_sel", "ci_low", "transfer_p_value", "sae_auc", "model_bits", "error_sel"}
                assert known == {key: cells[probe][key] for key in known}


def cells_in(folder):
    """Return the stored cells of the SAE whose files are in the folder, and its files."""
    found = {path: result_file.read(path) for path in files(folder)}
    layers = {path: [int(name[6:]) for name in file if name != "_run"] for path, file in found.items()}
    return read_cells((path, file["_run"]["key"], layers[path]) for path, file in found.items()), found.values()


def r2(found):
    return scores.statistics(found).transfer_r2


def test_the_mean_of_an_sae_and_the_difference_of_two(run):
    folders = sorted(path for path in run.out.iterdir() if path.is_dir())
    (a, files_a), (b, files_b) = map(cells_in, folders)
    for cells, found, other, rivals in ((a, files_a, b, files_b), (b, files_b, a, files_a)):
        results = [layer for file in found for name, layer in file.items() if name != "_run"]
        deltas = [cell["delta_sel"] for layer in results for cell in layer.values() if isinstance(cell, dict)]
        assert len(deltas) == len(cells) == 6
        for file in found:
            level = file["_run"]["sae_level"]
            assert level["delta_sel"] == pytest.approx(np.mean(deltas))
            assert (level["delta_sel_ci_low"], level["n_cells"]) == (mean_delta(cells).low, 6)
            (rival, versus), *none = level["compared"].items()
            assert none == []
            assert all(rival == file["_run"]["config"]["sae"] for file in rivals)
            assert versus["delta_sel"] == pytest.approx(mean_delta(cells).value - mean_delta(other).value)
            assert versus["delta_sel_ci_high"] == difference(cells, other).high
            assert level["transfer_r2"] == pytest.approx(np.mean([r2(found) for found in cells.values()]))
            paired = [r2(cells[place]) - r2(other[place]) for place in cells]
            assert versus["transfer_r2"] == pytest.approx(np.mean(paired))
            assert versus["transfer_r2_ci_low"] < versus["transfer_r2"] < versus["transfer_r2_ci_high"]
    assert difference(a, a).p_value == 1
    assert difference(a, {}) is None


def test_scores_of_another_run_are_not_used(run, tmp_path):
    path = files(run.out)[0]
    key = result_file.read(path)["_run"]["key"]
    assert read_cells([(path, key, [0])])
    assert read_cells([(path, {**key, "seed": 1}, [0])]) is None
    assert read_cells([(tmp_path / path.name, key, [0])]) is None


def test_q_values_are_over_all_that_was_measured_of_an_sae(run):
    from scipy.stats import false_discovery_control

    for folder in (path for path in run.out.iterdir() if path.is_dir()):
        found = numbers(folder).values()
        cells = [cell for file in found for layer in file.values() for cell in layer.values() if isinstance(cell, dict)]
        for prefix in ("", "transfer_"):
            p = [cell[f"{prefix}p_value"] for cell in cells]
            q = [cell[f"{prefix}q_value"] for cell in cells]
            np.testing.assert_allclose(q, false_discovery_control(p))
        names = {path.name for path in files(folder)}
        assert all(set(result_file.read(path)["_run"]["q_family"]) == names for path in files(folder))


def in_runs_of_their_own(run, folder):
    """Store the SAEs of a run as if each had been measured alone: one directly in a folder, the other one level below.

    Returns the comparisons of the original run, by the names of both.
    """
    found = {}
    saes = sorted(path for path in run.out.iterdir() if path.is_dir())
    for sae, place in zip(saes, (folder, folder / "second"), strict=True):
        for path in files(sae):
            known = result_file.read(path)["_run"]
            for other, versus in known["sae_level"]["compared"].items():
                found[known["config"]["sae"], other] = versus
            write_changed(path, place / path.name, level={**known["sae_level"], "compared": {}})
            shutil.copytree(scores.folder_of(path), scores.folder_of(place / path.name))
    return found


def test_saes_of_two_runs_are_compared_as_if_they_had_been_measured_together(run, tmp_path):
    found = in_runs_of_their_own(run, tmp_path)
    study = study_of(load_files(result_files(tmp_path)))
    (pair,) = study.neighbours
    assert study.not_compared == []
    assert pair.figures == found[pair.one.name, pair.other.name]
    assert study.comparison(pair.other.name, pair.one.name).figures == found[pair.other.name, pair.one.name]


def test_an_sae_whose_datasets_are_of_two_runs_has_its_mean_over_both(run, tmp_path):
    folder = next(path for path in sorted(run.out.iterdir()) if path.is_dir())
    level = result_file.read(files(folder)[0])["_run"]["sae_level"]
    for number, path in enumerate(files(folder)):
        alone = {**level, "delta_sel": float(number), "compared": {}}
        write_changed(path, tmp_path / str(number) / path.name, level=alone)
        shutil.copytree(scores.folder_of(path), scores.folder_of(tmp_path / str(number) / path.name))
    (sae,) = study_of(load_files(result_files(tmp_path))).saes
    assert sae.overall("delta_sel") == (level["delta_sel"], level["delta_sel_ci_low"], level["delta_sel_ci_high"])


def test_missing_scores_are_reported(run, tmp_path):
    in_runs_of_their_own(run, tmp_path)
    shutil.rmtree(scores.folder_of(files(tmp_path / "second")[0]))
    study = study_of(load_files(result_files(tmp_path)))
    assert study.neighbours == []
    (line,) = study.not_compared
    assert "the stored scores of" in line
