"""Result files are complete or absent, and are resumed only by the same request."""

from __future__ import annotations

import json
import os

import pytest

from delta_selectivity.errors import RequestError
from delta_selectivity.records import result_file
from delta_selectivity.records.result_file import RecordFile, model_slug, result_path, slug

KEY = {"schema": result_file.SCHEMA_VERSION, "model": "abc", "seed": 0, "views": ("model", "sae")}
RUN = result_file.describe_run({"sae": "some/sae"})
LAYER = {"mse_pos": 0.5, "gender": {"model_sel": 0.75, "sae_sel": 0.5, "delta_sel": -0.25}}


def written(path, key=None, layers=(0,), complete=True):
    file = RecordFile.open(path, key or KEY, RUN, overwrite=False)
    file.seconds, file.resources, file.complete = {"forward": 1.0}, {"peak_ram_gb": 0.1}, complete
    file.q_family = [path.name]
    file.write(dict.fromkeys(layers, LAYER))
    return file


def test_the_written_json_has_the_documented_keys(tmp_path):
    path = tmp_path / "m_d.json"
    written(path, layers=(10, 2))
    found = json.loads(path.read_text())
    assert list(found) == ["layer_2", "layer_10", "_run"]
    assert found["layer_2"] == LAYER
    assert found["_run"]["complete"] is True
    assert {"schema_version", "config", "versions", "commit", "started", "seconds"} <= found["_run"].keys()
    assert found["_run"]["versions"]["torch"]


def test_the_same_request_resumes(tmp_path):
    path = tmp_path / "m_d.json"
    written(path, layers=(0, 3), complete=False)
    again = RecordFile.open(path, dict(reversed(KEY.items())), RUN, overwrite=False)
    assert sorted(again.layers) == [0, 3]
    assert again.layers[3] == LAYER
    assert not again.complete


def test_another_request_is_rejected_with_the_difference(tmp_path):
    path = tmp_path / "m_d.json"
    written(path)
    before = path.read_bytes()
    with pytest.raises(RequestError, match=r"`seed` 0 there, 1 now.*`overwrite`"):
        RecordFile.open(path, {**KEY, "seed": 1}, RUN, overwrite=False)
    assert path.read_bytes() == before
    assert RecordFile.open(path, {**KEY, "seed": 1}, RUN, overwrite=True).layers == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("0.75", "0.85"),
        lambda text: "",
        lambda text: "[]",
        lambda text: '{"layer_0": {}}',
        lambda text: text.replace('"layer_0"', '"layer_x"'),
    ],
    ids=["truncated", "edited", "empty", "list", "no _run", "odd layer"],
)
def test_a_damaged_file_is_rejected(tmp_path, damage):
    path = tmp_path / "m_d.json"
    written(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(RequestError, match="overwrite"):
        RecordFile.open(path, KEY, RUN, overwrite=False)


def test_a_failed_write_keeps_only_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m_d.json"
    file = written(path)
    before = path.read_bytes()

    def full_disk(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        file.write({0: LAYER, 1: LAYER})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m_d.json"]


def test_nan_is_never_written(tmp_path):
    file = RecordFile.open(tmp_path / "m_d.json", KEY, RUN, overwrite=False)
    with pytest.raises(ValueError, match="JSON"):
        file.write({0: {"mse_pos": float("nan")}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("EleutherAI/pythia-160m", "EleutherAI_pythia-160m"),
        ("../../etc/passwd", "passwd"),
        ("..", "unnamed"),
        ("a b\n*?é", "a_b_é"),
        (".hidden", "hidden"),
    ],
)
def test_names_become_safe_parts_of_file_names(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert slug(name) == expected if name != ".." else "/" not in slug(name)


def test_a_local_folder_is_named_by_its_last_part_and_a_mirror_of_the_hub_by_its_id(tmp_path, monkeypatch):
    folder = tmp_path / "EleutherAI" / "pythia-160m"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert slug(str(folder)) == slug(f"{folder}/") == "pythia-160m"
    assert slug("EleutherAI/pythia-160m") == "EleutherAI_pythia-160m"
    assert result_path(tmp_path, "EleutherAI/pythia-160m", "wikidata_gender").name == (
        "EleutherAI_pythia-160m_wikidata_gender.json"
    )


@pytest.mark.parametrize("name", ["owner/name", "release/layer_1/width_16k", "gpt2", "my_saes", "a/b/c"])
def test_names_do_not_depend_on_what_lies_in_the_current_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = slug(name), model_slug(name)
    (tmp_path / name).mkdir(parents=True)
    assert (slug(name), model_slug(name)) == before


def test_a_long_relative_path_to_a_model_counts_by_its_last_part():
    assert model_slug("models/of/mine") == "mine"
    assert slug("release/layer_1/width_16k") == "release_layer_1_width_16k"


def test_long_names_stay_distinct_and_short():
    a, b = slug("x" * 300 + "a"), slug("x" * 300 + "b")
    assert a != b
    assert len(a) <= 100


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(RequestError, match="cannot write"):
        result_file.prepare_folder(blocked / "results")
