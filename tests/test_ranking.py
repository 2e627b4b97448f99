"""SAEs ranked by transfer_r2, with ties where they do not differ significantly."""

from __future__ import annotations

import pytest
from result_sets import write_changed, write_set

from delta_selectivity.records import result_file
from delta_selectivity.reporting import ranking
from delta_selectivity.reporting.page import page
from delta_selectivity.reporting.plots import plots_of
from delta_selectivity.reporting.results import load, result_files
from delta_selectivity.reporting.study import study_of
from delta_selectivity.reporting.tables import overview

ABCD = ("a", "b", "c", "d")  # with transfer_r2 0.80, 0.79, 0.78, 0.77, all different significantly


def files_of(folder, ties=(), saes=ABCD, change=lambda level: level, **more):
    """Return result files in which the paired intervals of these pairs include 0; `change` edits every level."""
    write_set(folder / "first", saes=saes, layers=range(1), **more)
    for path in result_files(folder / "first"):
        run = result_file.read(path)["_run"]
        for other, level in run["sae_level"]["compared"].items():
            if {run["config"]["sae"], other} in [set(tie) for tie in ties]:
                level["transfer_r2_ci_low"], level["transfer_r2_ci_high"] = -0.02, 0.02
        target = folder / "second" / path.relative_to(folder / "first")
        target.parent.mkdir(parents=True)
        write_changed(path, target, level=change(run["sae_level"]))
    return load(result_files(folder / "second"))


def places(files):
    study = study_of(files)
    found = ranking.rank(study)
    return [(sae.label, found.place(sae)) for sae in ranking.in_order(study, found)], found.sentence()


@pytest.mark.parametrize(
    ("ties", "expected", "told"),
    [
        ([], ["1", "2", "3", "4"], "All 6 pairs of SAEs differ significantly."),
        (["bc"], ["1", "2-3", "2-3", "4"], "5 of 6 pairs of SAEs differ significantly. The others are b and c."),
        (["ab", "bc"], ["1-2", "1-3", "2-3", "4"],
         "4 of 6 pairs of SAEs differ significantly. The others are a and b; b and c."),
        (["ab", "ac", "ad", "bc", "bd"], ["1-4", "1-4", "1-3", "2-4"],
         "1 of 6 pairs of SAEs differ significantly. The others are a and b; a and c; a and d; and 2"),
        (["ab", "ac", "ad", "bc", "bd", "cd"], ["1-4"] * 4, "None of the 6 pairs of SAEs differs significantly"),
    ],
)  # fmt: skip
def test_ranks_are_the_possible_positions(ties, expected, told, tmp_path):
    found, sentence = places(files_of(tmp_path, ties))
    assert found == list(zip(ABCD, expected, strict=True))
    assert told in sentence


def test_the_order_is_by_transfer_r2(tmp_path):
    def turned(level):
        level["transfer_r2"] = 1 - level["transfer_r2"]
        for other in level["compared"].values():
            other["transfer_r2"] *= -1
            low, high = other["transfer_r2_ci_low"], other["transfer_r2_ci_high"]
            other["transfer_r2_ci_low"], other["transfer_r2_ci_high"] = -high, -low
        return level

    found, _ = places(files_of(tmp_path, change=turned))
    assert found == [("d", "1"), ("c", "2"), ("b", "3"), ("a", "4")]


def test_ranking_two_saes_and_one(tmp_path):
    assert places(files_of(tmp_path / "two", saes=("a", "b")))[1] == (
        "transfer_r2 is highest for a (0.800) and lowest for b (0.790). The two SAEs differ significantly."
    )
    tied = places(files_of(tmp_path / "tied", ["ab"], saes=("a", "b")))
    assert tied[0] == [("a", "1-2"), ("b", "1-2")]
    assert "The two SAEs do not differ significantly" in tied[1]
    assert places(files_of(tmp_path / "one", saes=("a",))) == ([("a", "-")], None)


def test_baselines_come_last_and_have_no_rank(tmp_path):
    found, _ = places(files_of(tmp_path, saes=("a", "b"), baselines=[("random", "a")]))
    assert found[-1] == ("baseline: random of a", "-")


def test_results_without_the_score_are_not_ranked(tmp_path):
    def without(cells):
        return {name: {**cell, "transfer_r2": None} for name, cell in cells.items()}

    def empty(level):
        bare = {name: None if name.startswith("transfer_r2") else value for name, value in level.items()}
        below = level.get("compared", {})
        return bare | ({"compared": {name: empty(other) for name, other in below.items()}} if below else {})

    found, sentence = places(files_of(tmp_path, edit=without, change=empty))
    assert (sorted(found), sentence) == ([(name, "-") for name in ABCD], None)


def test_the_summary_and_the_page_begin_with_the_ranking(tmp_path):
    files = files_of(tmp_path, ["bc"])
    lines = overview(files).splitlines()
    assert lines[0].replace(" ", "").startswith("|SAE|rank|survives|95%interval|")
    assert [line.split("|")[2].strip() for line in lines[2:6]] == ["1", "2-3", "2-3", "4"]
    assert any(line.endswith("5 of 6 pairs of SAEs differ significantly. The others are b and c.") for line in lines)
    study = study_of(files)
    plots = plots_of(study)
    html = page(study, plots, {plot.name: "<svg></svg>" for plot in plots}, with_links=False)
    assert "<b>Ranked</b>: transfer_r2 is highest for a (0.800)" in html
    assert html.index("5 of 6 pairs of SAEs differ significantly") < html.index("<table")
    assert "2–3" in html.partition('<section id="saes">')[2]
    assert next(plot.name for plot in plots.saes) == "mean_transfer_r2"


def test_only_shared_cells_decide_the_rank(tmp_path):
    """Its mean is the best, but over easier cells than those that both have."""

    def turned(level):
        for other in level["compared"].values():
            low, high = other["transfer_r2_ci_low"], other["transfer_r2_ci_high"]
            other |= {"transfer_r2": -other["transfer_r2"], "transfer_r2_ci_low": -high, "transfer_r2_ci_high": -low}
        return level

    found, sentence = places(files_of(tmp_path, saes=("a", "b"), change=turned))
    assert found == [("b", "1"), ("a", "2")]
    assert sentence == "The two SAEs differ significantly."
