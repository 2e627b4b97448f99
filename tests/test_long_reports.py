"""Reports of many tasks: by family, collapsed, the largest losses first."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
from result_sets import write_set

from delta_selectivity.records import result_file
from delta_selectivity.records.result_file import RecordFile
from delta_selectivity.reporting import tables
from delta_selectivity.reporting.csv_file import write_csv
from delta_selectivity.reporting.output import write_page
from delta_selectivity.reporting.plots import plots_of
from delta_selectivity.reporting.results import load, result_files
from delta_selectivity.reporting.study import MAX_DATASETS, MAX_PANELS, study_of

N = 60  # number of tasks
SAES = {"one": "one", "two": "two"}
FAMILIES = ("people", "places", "code")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Return two SAEs on `N` tasks of three families; the i-th task loses i thousandths."""
    folder = tmp_path_factory.mktemp("long")
    (source,) = sorted(write_set(folder / "sources", saes={"one": "one"}).glob("**/*gender.json"))
    found = result_file.read(source)
    level = found["_run"]["sae_level"]
    means = {name: level[name] for name in level if re.fullmatch(r"(delta_sel|transfer_r2)(_ci_(low|high))?", name)}
    own = {**means, "delta_sel_spread": 0.01, "transfer_r2_spread": None, "n_tasks": N, "n_sources": N}
    families = {family: {**own, "n_tasks": N // 3, "n_sources": N // 3} for family in FAMILIES}
    for sae in SAES:
        for i in range(N):
            run = copy.deepcopy(found["_run"])
            kept = {name: run[name] for name in ("config", "versions", "commit", "started")}
            kept["config"] |= {"sae": sae, "sae_label": sae}
            kept |= {"task": {"family": FAMILIES[i % 3], "source": f"task_{i}"}}
            layer = copy.deepcopy(found["layer_0"])
            (name,) = [name for name in layer if isinstance(layer[name], dict)]
            probe = layer.pop(name)
            told = {"reason": "too few"} if i == 7 else {"delta_sel": -i / 1000, "q_value": 0.01}
            path = folder / "results" / sae / f"tiny-pythia_{i}_task.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            fields = {
                "warnings": [f"layer 0 task_{i}: 1 probe fits did not converge"], "complete": True,
                "seconds": {}, "resources": {}, "q_family": [],
                "sae_level": {**level, "tasks": {**own, "families": families}},
            }  # fmt: skip
            RecordFile(path, {**run["key"], "sae": sae}, kept, **fields).write(
                {0: {**layer, f"task_{i}": {**probe, **told}}}
            )
    return load(result_files(folder / "results"))


def test_a_terminal_shows_the_largest_losses_once_each_the_reasons_and_the_families(long):
    text = tables.render(long)
    assert f"the {tables.MAX_CELLS} of {2 * (N - 1)} probes with the largest losses" in text
    worst = [line for line in text.splitlines() if re.match(r"\| (one|two) +\| \d+_task", line)]
    assert len(worst) == tables.MAX_CELLS
    assert [int(re.search(r"(\d+)_task", line)[1]) for line in worst[::2]] == list(range(N - 1, N - 11, -1))
    assert "not measured: 7_task, task_7: too few" in text and text.count("not measured:") == 1
    rows = [line.split("|")[1:4] for line in text.splitlines() if "| one " in line and "task" not in line.split("|")[1]]
    assert {row[1].strip() for row in rows if len(row) > 2} >= {"all tasks", *FAMILIES}
    assert len(text.splitlines()) < 80
    assert max(map(len, text.splitlines())) < 250


def test_few_tasks_are_shown_in_full(long):
    few = [file for file in long if int(re.search(r"_(\d+)_task", file[0].name)[1]) < MAX_DATASETS]
    text = tables.render(few)
    assert "largest losses" not in text and text.count("| layer |") == 2 * MAX_DATASETS
    assert len(plots_of(study_of(few)).heatmaps) == MAX_DATASETS


def test_families_sort_tasks_by_loss(long):
    study = study_of(long)
    assert study.has_many_datasets and set(study.families) == set(FAMILIES)
    numbers = [int(name.partition("_")[0]) for name in study.families["people"]]
    assert numbers == sorted(range(0, N, 3), reverse=True)
    assert study.families["places"][-1] == "7_task"  # it was not measured
    assert len(study.panel_probes) == MAX_PANELS and study.panel_probes[0] == (f"{N - 1}_task", f"task_{N - 1}")


def test_the_number_of_plots_grows_with_families(long):
    study = study_of(long)
    plots = plots_of(study)
    assert set(plots.heatmaps) == set(FAMILIES)
    assert len(list(plots)) < 60
    shown = [row[:4] for family in FAMILIES for plot in plots.heatmaps[family] for row in plot.rows]
    assert len(shown) == len(set(shown)) == 2 * N


def test_the_page_collapses_families_and_warnings(long, tmp_path):
    page = tmp_path / "page.html"
    write_page(study_of(long), page)
    text = page.read_text("utf-8")
    sections = re.findall(r'<section id="dataset-\d+"><h2>([^<]+)</h2><details><summary>([^<]+)</summary>', text)
    assert [title for title, _ in sections] == [f"{family} ({N // 3})" for family in ("places", "code", "people")]
    assert "largest losses: task_57 −0.057, task_54 −0.054, task_51 −0.051" in sections[2][1]
    assert text.count('class="notice warning"') == 1 and f"{N} different warnings" in text
    assert 'id="search"' in text and "By family (6 lines)" in text
    assert page.stat().st_size < 5_500_000


def test_the_csv_has_a_line_for_every_cell_with_its_family(long, tmp_path):
    import csv

    write_csv(long, tmp_path / "all.csv")
    with (tmp_path / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * N
    assert {row["family"] for row in rows} == set(FAMILIES)
    assert np.isclose(
        sum(float(row["delta_sel"]) for row in rows if not row["reason"]), -2 * (sum(range(N)) - 7) / 1000
    )
