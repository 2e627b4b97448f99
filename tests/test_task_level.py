"""Means over tasks as a random sample: compared with Student's t, with people alone, and with planted truth."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats
from runs import Request, files

from delta_selectivity.probing.uncertainty import Cell, estimate_mean
from delta_selectivity.records import figures, result_file
from delta_selectivity.records.task_level import TaskOfFile, levels, over_tasks, task_of
from delta_selectivity.tasks import parse_dataset_names
from delta_selectivity.tasks.suite_files import SUITE, source_of

TRUTH = 0.3


def cell(mean: float, n: int, first_person: int = 0, noise: np.ndarray | None = None) -> Cell:
    noise = np.zeros(n) if noise is None else noise
    return Cell((mean + noise)[None], np.arange(n) % 2 == 0, np.arange(first_person, first_person + n))


def draw(random: np.random.Generator, n_sources: int, spread: float, share: bool = False, tasks_of: int = 1):
    """Draw sources whose true values are normal around `TRUTH`; tasks have their own people or share them."""
    people = random.normal(size=60) * 0.5
    sources = {}
    for source in range(n_sources):
        value, n = TRUTH + spread * random.normal(), 20 * (1 + source % 3)
        own = people[:n] if share else random.normal(size=n) * 0.5
        first = 0 if share else 1000 * source
        sources[str(source)] = [
            [cell(value, n, first, own + 0.5 * random.normal(size=n))] for _ in range(1 + source % tasks_of)
        ]
    return sources


def test_tasks_with_separate_people_use_students_t():
    sources = draw(np.random.default_rng(0), 12, spread=1.0)
    found = over_tasks(sources).estimate
    values = [estimate_mean(cells).value for ((cells),) in sources.values()]
    low, high = scipy.stats.t.interval(0.95, 11, np.mean(values), scipy.stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), low, high), rel=1e-3)
    assert found.degrees_of_freedom == pytest.approx(11, rel=1e-2)


def test_equal_tasks_have_only_the_error_of_people():
    sources = {str(i): [[cell(0.1, 40, 0, np.linspace(-1, 1, 40))]] for i in range(6)}
    found = over_tasks(sources)
    assert found.spread == 0
    assert found.estimate.standard_error == pytest.approx(estimate_mean(sources["0"][0]).standard_error)


def test_tasks_have_equal_weights():
    sources = {"a": [[cell(0.0, 40)]], "b": [[cell(1.0, 40, 100)] * 5]}
    assert over_tasks(sources).value == pytest.approx(0.5)
    three = {"a": [[cell(0.0, 40)], [cell(0.3, 40)]], "b": [[cell(1.2, 40, 100)]]}
    assert over_tasks(three).value == pytest.approx(0.5)
    assert (over_tasks(three).n_tasks, over_tasks(three).n_sources) == (3, 2)


def test_a_single_source_has_no_interval():
    found = over_tasks({"a": [[cell(0.0, 40)], [cell(0.3, 40)]]})
    assert found.estimate is None and found.spread is None and found.value == pytest.approx(0.15)


def test_the_spread_of_tasks_is_estimated():
    random = np.random.default_rng(1)
    found = [over_tasks(draw(random, 30, 0.2)).spread for _ in range(30)]
    assert np.sqrt(np.mean(np.square(found))) == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize(
    ("n_sources", "spread", "share", "tasks_of"),
    [(4, 0.2, False, 1), (10, 0.0, False, 1), (5, 0.15, False, 3), (10, 0.1, True, 1)],
)
def test_intervals_cover_the_mean_of_all_tasks(n_sources, spread, share, tasks_of):
    random = np.random.default_rng(2)
    n, covered, by_people = 250, 0, 0
    for _ in range(n):
        sources = draw(random, n_sources, spread, share, tasks_of)
        found = over_tasks(sources).estimate
        people = estimate_mean([one for tasks in sources.values() for cells in tasks for one in cells])
        covered += found.low <= TRUTH <= found.high
        by_people += people.low <= TRUTH <= people.high
    assert 0.92 <= covered / n <= 0.995
    assert covered >= by_people
    if spread and not share:
        assert by_people / n < 0.9  # with people alone, the interval is too narrow because tasks differ


# --- in result files


def test_families_have_means_of_their_own():
    values = {"a": 0.0, "b": 0.2, "c": 0.6, "own": 1.0}
    tasks = {name: TaskOfFile(None if name == "own" else "places" if name != "c" else "code", name) for name in values}
    cells = {
        (name, layer, name): cell(v, 40, 100 * i) for i, (name, v) in enumerate(values.items()) for layer in (0, 1)
    }
    found = levels({"delta_sel": cells, "transfer_r2": {}}, tasks)
    assert (found["n_tasks"], found["delta_sel"], found["transfer_r2"]) == (4, pytest.approx(0.45), None)
    assert list(found["families"]) == ["code", "places"]
    assert found["families"]["code"]["delta_sel_ci_low"] is None
    assert found["families"]["places"]["delta_sel"] == pytest.approx(0.1)
    assert found["families"]["places"]["delta_sel_ci_low"] < 0.1
    assert figures.fault({}, {"compared": {}, "tasks": found}) is None
    assert levels({"delta_sel": {place: c for place, c in cells.items() if place[0] == "a"}}, tasks) is None


@pytest.mark.parametrize("tasks", ["good", {"families": 3}, {"families": {"code": 1}}, {"delta_sel": "0.1"}])
def test_forged_means_over_tasks_are_refused(tasks):
    assert figures.fault({}, {"compared": {}, "tasks": tasks}) is not None


def test_tasks_of_one_file_share_a_source():
    assert source_of("117_us_state_FL") == source_of("13_us_state") == "us_state"
    assert source_of("22_headline_isobama") == source_of("21_headline_istrump") != source_of("139_news_class_Politics")
    assert source_of("66_living-room") == "living-room"
    assert len({source_of(name) for name in SUITE}) == 68
    assert task_of({}, "women") == TaskOfFile(None, "women")


@pytest.fixture(scope="module")
def suite_run(tiny_model, tiny_saes, tmp_path_factory):
    """Run four tasks of three sources on the tiny model; one of them has too few rows to be measured."""
    from pathlib import Path

    out = tmp_path_factory.mktemp("suite")
    flags = (
        "--datasets",
        "117,118,141,25",
        "--shuffle_select_n",
        "40",
        "--layers",
        "1",
        "--folds",
        "5",
        "--repeats",
        "2",
    )
    assert Request(tiny_model, (tiny_saes,), Path(), out, flags).run() == 0
    return files(out)


def test_a_run_over_tasks_of_the_suite_has_numbers_or_a_reason_for_each(suite_run):
    names = [path.name.removeprefix("pythia-tiny_").removesuffix(".json") for path in suite_run]
    wanted = parse_dataset_names("117,118,141,25")
    assert sorted(name.split("pythia-tiny_")[-1] for name in names) == sorted(wanted)
    for path in suite_run:
        found = result_file.read(path)
        probes = [value for value in found["layer_1"].values() if isinstance(value, dict)]
        assert probes and all(("reason" in probe) != (probe.get("delta_sel") is not None) for probe in probes)
        assert ("headline_year" in path.name) == any("reason" in probe for probe in probes)


def test_its_files_hold_the_means_over_its_tasks(suite_run):
    levels_found = [result_file.read(path)["_run"]["sae_level"]["tasks"] for path in suite_run]
    assert all(level == levels_found[0] for level in levels_found)
    level = levels_found[0]
    assert (level["n_tasks"], level["n_sources"]) == (3, 2)
    values = [
        value["delta_sel"]
        for path in suite_run
        for value in json.loads(path.read_text())["layer_1"].values()
        if isinstance(value, dict) and "reason" not in value
    ]
    assert level["delta_sel"] == pytest.approx(np.mean(values))
    assert level["delta_sel_ci_low"] < level["delta_sel"] < level["delta_sel_ci_high"]
    assert level["families"]["places"]["delta_sel_ci_low"] is None  # both of one source
    told = [result_file.read(path)["_run"]["task"] for path in suite_run]
    assert {"family": "places", "source": "us_state"} in told and {"family": "news", "source": "news_class"} in told


def test_its_results_are_a_table_with_families_and_their_rows_have_texts(suite_run):
    from delta_selectivity import Results

    results = Results.load(suite_run[0].parent)
    frame = results.to_frame()
    assert set(frame["family"]) == {"places", "news"}
    assert set(frame["dataset"]) == set(parse_dataset_names("117,118,141,25"))
    rows = results.rows("us_state_FL")
    assert len(rows) == 40 and rows["text"].notna().all() and set(rows["label"]) == {"1", "not 1"}


def test_two_saes_differ_by_the_mean_over_tasks_of_their_paired_differences(suite_run):
    from delta_selectivity.records import sae_level

    cells = {}
    for path in suite_run:
        cells |= sae_level.read_cells([(path, result_file.read(path)["_run"]["key"], [1])])
    tasks = {path.name: task_of(result_file.read(path)["_run"], path.name) for path in suite_run}
    swapped = {
        place: dataclasses.replace(found, views={**found.views, "sae": found.views["model"]})
        for place, found in cells.items()
    }
    found = sae_level.compare(cells, swapped, tasks)["tasks"]
    alone = sae_level.summarise(cells, tasks)["tasks"]
    for end in ("", "_ci_low", "_ci_high", "_spread"):  # minus the model's own scores, it is the delta
        assert found[f"delta_sel{end}"] == pytest.approx(alone[f"delta_sel{end}"])
    assert "families" not in found and found["n_tasks"] == 3
