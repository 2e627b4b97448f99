"""docs/results.schema.json: files of the program are valid, and broken ones are not."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import people, write_csv
from jsonschema import Draft202012Validator
from runs import Request, files

from delta_selectivity.probing.selectivity import ProbeResult
from delta_selectivity.run.reconstruction import Reconstruction
from scripts import update_schema

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = json.loads((ROOT / "docs" / "results.schema.json").read_text("utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)
DEMO = files(ROOT / "results" / "demo")
GENDER = ROOT / "results" / "demo" / "tiny-pythia-saes-k8" / "tiny-pythia_wikidata_gender.json"


def faults(content):
    """Return the places where a result file breaks the schema, as `a/b/c`, in order."""
    return sorted("/".join(map(str, error.absolute_path)) for error in VALIDATOR.iter_errors(content))


def read(path):
    return json.loads(path.read_text("utf-8"))


def test_the_schema_is_valid_and_up_to_date():
    Draft202012Validator.check_schema(SCHEMA)
    assert update_schema.main(["--check"]) == 0


def test_an_outdated_schema_is_detected_and_rewritten(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(update_schema, "TARGET", tmp_path / "results.schema.json")
    update_schema.TARGET.write_text("{}\n", "utf-8")
    assert update_schema.main(["--check"]) == 1
    assert "scripts.update_schema" in capsys.readouterr().out
    assert update_schema.TARGET.read_text("utf-8") == "{}\n"
    assert update_schema.main([]) == 0
    assert json.loads(update_schema.TARGET.read_text("utf-8")) == SCHEMA


def test_it_describes_every_figure_and_names_every_key_of_the_run():
    parts = SCHEMA["$defs"]
    for part, kind in (("measured", ProbeResult), ("layer", Reconstruction)):
        known = parts[part]["properties"]
        assert known.keys() >= {field.name for field in fields(kind)}
        assert all(len(figure["description"]) > 10 for figure in known.values())
    page = (ROOT / "docs" / "numbers.md").read_text("utf-8")
    told = page.partition("## `_run`\n")[2].partition("\n## ")[0]
    assert set(parts["run"]["properties"]) == set(re.findall(r"`(\w+)`", told))


@pytest.mark.parametrize("path", DEMO, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_kept_results_follow_it(path):
    assert faults(read(path)) == []


@pytest.fixture(scope="module")
def fresh(tiny_model, tiny_saes, tmp_path_factory):
    """Return result files of a run with all views and baselines; one of its two probes has too few people."""
    folder = tmp_path_factory.mktemp("fresh")
    few = [
        {**row, "text": f"{row['text']} again", "group": row["group"] if row["label"] else "all one"}
        for row in people(60)
    ]
    rows = [{**row, "task": "women"} for row in people(120)] + [{**row, "task": "few"} for row in few]
    flags = ("--folds", "3", "--repeats", "2", "--views", "error,latents,ksparse", "--baselines", "--layers", "1")
    data = write_csv(folder / "women.csv", rows)
    assert Request(tiny_model, (tiny_saes,), data, folder / "results", flags).run() == 0
    return files(folder / "results")


def test_a_fresh_run_follows_it_with_all_views_baselines_and_a_probe_without_numbers(fresh):
    found = [read(path) for path in fresh]
    kinds = {content["_run"]["config"].get("baseline") for content in found}
    assert kinds == {None, "identity", "random", "pca", "mean", "shuffled", "names"}
    cells = [cell for content in found for cell in content["layer_1"].values() if isinstance(cell, dict)]
    assert {"reason" in cell for cell in cells} == {True, False}
    assert any({"latent_sel", "error_sel", "k5_sel"} <= cell.keys() for cell in cells)
    assert [faults(content) for content in found] == [[]] * len(found)
    assert all(content["_run"]["positive_class"] == {"women": "1", "few": "1"} for content in found)
    assert all(cell["n_people_effective"] <= cell["n_people"] for cell in cells)


def test_a_run_that_goes_on_follows_it_without_q_values_and_one_that_ended_does_not():
    content = read(GENDER)
    for name in ("q_value", "transfer_q_value"):
        del content["layer_0"]["gender"][name]
    assert set(faults(content)) == {"layer_0/gender"}
    content["_run"] |= {"complete": False, "sae_level": {"compared": {}}}
    assert faults(content) == []


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("layer_0/gender/delta_sel", "-0.05"),
        ("layer_0/gender/delta_sel", None),
        ("layer_0/gender/p_value", 1.5),
        ("layer_0/gender/n_people", 3329.5),
        ("layer_0/gender/preserved", 1),
        ("layer_0/l0", -1),
        ("layer_0/gender", 0.75),
        ("_run/schema_version", 1),
        ("_run/results_sha256", "abc"),
        ("_run/seconds/probes", None),
        ("_run/sae_level/n_cells", 0),
    ],
)
def test_a_wrong_value_is_located(where, value):
    content = read(GENDER)
    *above, name = where.split("/")
    place = content
    for key in above:
        place = place[key]
    assert name in place
    place[name] = value
    assert set(faults(content)) == {where}


@pytest.mark.parametrize("where", ["", "layer_0/gender", "_run", "_run/sae_level"])
def test_an_unknown_key_is_found(where):
    content = read(GENDER)
    place = content
    for key in filter(None, where.split("/")):
        place = place[key]
    place["delta_self"] = 0.5
    assert faults(content) == [where]


def test_every_required_key_is_required():
    whole = read(GENDER)
    for above in ("layer_0", "layer_0/gender", "_run", "_run/sae_level"):
        keys = above.split("/")
        for name in _at(whole, keys):
            if isinstance(_at(whole, keys)[name], dict) and above == "layer_0":
                continue  # a layer has the probes that it has
            if name in (*update_schema.LATER, "positive_class", "task", "tasks"):
                continue  # files of earlier versions lack it
            content = copy.deepcopy(whole)
            del _at(content, keys)[name]
            assert faults(content), f"{above}/{name}"


def _at(content, keys):
    for key in keys:
        content = content[key]
    return content


def test_a_probe_cannot_have_both_numbers_and_a_reason():
    content = read(GENDER)
    content["layer_0"]["gender"]["reason"] = "too few people"
    assert faults(content)
