"""The layout of reports: views, a single layer, noise and long names."""

from __future__ import annotations

import io
import itertools
import json
import re

import matplotlib
import numpy as np
import pytest
from result_sets import write_set
from test_html_report import browser, opened, page_of, study_in  # noqa: F401

from delta_selectivity.cli import report
from delta_selectivity.reporting import levels, matrix, names
from delta_selectivity.reporting.drawing import axes_at, canvas
from delta_selectivity.reporting.plots import plots_of

LONG = [f"sae_release_of_a_long_name/blocks.3.hook_resid_post_average_l0_{n}" for n in (32, 64, 128)]


def with_views(cells):
    return {name: {**cell, "error_sel": 0.612, "latent_sel": 0.587} for name, cell in cells.items()}


def with_further(cells):
    ends = {"k16_ci_low": 0.612, "k16_ci_high": 0.672}
    wide = {name: {**cell, "k1_sel": 0.531, "k16_sel": 0.642, **ends} for name, cell in cells.items()}
    return {
        **wide,
        "delta_ce": 0.1239,
        "delta_ce_ci_low": 0.1,
        "delta_ce_ci_high": 0.15,
        "ce_recovered": None,
        "kl_pos": 0.201,
    }


def test_requested_views_are_in_tables_and_page(tmp_path, capsys):
    folder = write_set(tmp_path / "in", saes=("a/one", "b/two"), layers=[3], edit=with_views)
    assert report.main([str(folder)]) == 0
    per_sae, _, summary = (part for part in capsys.readouterr().out.split("\n\n") if part.startswith("| layer") or
                           (part.startswith("| SAE") and "probes x layers" in part))  # fmt: skip
    for table in (per_sae, summary):
        head, _, first, *_ = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
        found = dict(zip(head, first, strict=True))
        assert (found["error_sel"], found["latent_sel"]) == ("0.612", "0.587")
    _, root = page_of(folder, tmp_path / "r.html")
    assert [table.text.count("0.612") for table in root.all("table")[:1]] == [2]
    (data,) = (node for node in root.all("template") if node.attributes.get("id") == "cell-data")
    assert [line[-2:] for line in json.loads(data.text)] == [[["0.612", 0.612], ["0.587", 0.587]]] * 2


def test_k_sparse_and_downstream_figures_have_columns(tmp_path, capsys):
    folder = write_set(tmp_path / "in", layers=[3], edit=with_further)
    assert report.main([str(folder)]) == 0
    head, _, first, *_ = (line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    found = dict(zip(*([cell.strip() for cell in line.split("|")[1:-1]] for line in (head, first)), strict=True))
    assert {name: found[name] for name in ("k1_sel", "k16_sel", "delta_ce", "ce_recovered", "kl_pos")} == {
        "k1_sel": "0.531", "k16_sel": "0.642", "delta_ce": "0.124", "ce_recovered": "-", "kl_pos": "0.201"
    }  # fmt: skip
    _, root = page_of(folder, tmp_path / "r.html")
    (data,) = (node for node in root.all("template") if node.attributes.get("id") == "cell-data")
    assert json.loads(data.text)[0][-5:] == [
        ["0.531", 0.531], ["0.642", 0.642, "0.612 to 0.672"], ["0.124", 0.1239, "0.100 to 0.150"], ["-", None],
        ["0.201", 0.201],
    ]  # fmt: skip


def test_tables_omit_views_that_were_not_requested(tmp_path, capsys):
    folder = write_set(tmp_path / "in")
    assert report.main([str(folder)]) == 0
    assert "error_sel" not in capsys.readouterr().out


def test_a_single_layer_has_one_tick_and_offset_bars(tmp_path):
    study = study_in(write_set(tmp_path / "in", saes=("a/one", "b/two"), layers=[3]))
    (plot,) = (plot for plot in plots_of(study) if plot.name.startswith("levels"))
    (axes,) = plot.draw().figure.axes
    assert [float(tick) for tick in axes.get_xticks()] == [3.0]
    low, high = axes.get_xlim()
    bars = sorted(float(bar.get_segments()[0][0][0]) for bar in axes.collections)
    assert len(bars) == 3
    assert all(later - earlier > 0.1 * (high - low) for earlier, later in itertools.pairwise(bars))
    assert low < bars[0] < bars[-1] < high


def test_few_layers_have_a_tick_each(tmp_path):
    study = study_in(write_set(tmp_path / "in", layers=[2, 5]))
    (plot,) = (plot for plot in plots_of(study) if plot.name.startswith("levels"))
    assert list(plot.draw().figure.axes[0].get_xticks()) == [2, 5]
    assert levels.MAX_LAYER_TICKS == 10


@pytest.mark.parametrize("value", [-1.0, -0.5, 0.05, 0.5, 1.0])
def test_cells_that_are_not_significant_are_pale_and_hatched(value):
    """Rendered in grey: the pixels of a cell at any saturation."""
    found = {}
    for shown in (True, False):
        with matplotlib.rc_context({"savefig.dpi": 200}):
            figure = canvas(116, 22)
            axes = axes_at(figure, 0, 0, 58, 22)
            matrix.set_matrix_axes(axes, 1, 1)
            matrix.draw_matrix(axes, [matrix.MatrixCell(0, 0, value, "", shown, "")], 1.0)
            out = io.BytesIO()
            figure.savefig(out, format="png", facecolor="white")
        image = matplotlib.image.imread(io.BytesIO(out.getvalue()))[..., :3] @ [0.2126, 0.7152, 0.0722]
        height, width = image.shape
        found[shown] = image[int(0.3 * height) : int(0.7 * height), int(0.1 * width) : int(0.4 * width)]
    assert np.ptp(found[True]) < 0.02, "one colour"
    assert np.median(found[False]) > 0.9, "pale, whatever the value"
    assert np.ptp(found[False]) > 0.2, "with lines that are darker"


def test_shortened_names_keep_their_differences(tmp_path):
    assert all(
        short.endswith(f"l0_{number}") for short, number in zip(names.short_names(LONG, 16), (32, 64, 128), strict=True)
    )
    study = study_in(write_set(tmp_path / "in", saes=LONG))
    drawn = {plot.name: plot.svg() for plot in plots_of(study)}
    for name in ("mean_delta_sel", "rivals_delta_sel", "differences_delta_sel", "delta_against_l0"):
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn[name])
        for number in ("l0_32", "l0_64", "l0_128"):
            assert any(number in text for text in texts), (name, number)
    (legend,) = (svg for name, svg in drawn.items() if name.startswith("levels"))
    assert all(f"l0_{number}" in legend for number in (32, 64, 128))


@pytest.mark.parametrize("room", [3, 4, 8, 12, 30])
def test_shortened_names_are_distinct_at_any_length(room):
    rng = np.random.default_rng(0)
    for _ in range(200):
        texts = list({"".join(rng.choice(list("ab"), rng.integers(1, 40))) for _ in range(6)})
        short = names.short_names(texts, room)
        assert len(set(short)) == len(texts)
        assert max(map(len, short)) <= room


def test_narrow_tables_label_every_figure(tmp_path):
    _, root = page_of(write_set(tmp_path / "in", saes=("a/one", "b/two")), tmp_path / "r.html")
    for table in (found for found in root.all("table") if found.attributes.get("id") != "cells"):
        heads = [head.text for head in table.all("thead")[0].all("th")]
        for row in table.all("tbody")[0].all("tr"):
            assert [cell.attributes["data-head"] for cell in row.all("td")] == heads[1:]


CUT = """
    [...document.querySelectorAll(".scroll")].filter((box) => box.scrollWidth > box.clientWidth + 1)
        .map((box) => box.closest("section").id)
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 400])
def test_no_column_is_cut_off(width, browser, tmp_path):  # noqa: F811
    path = tmp_path / "report.html"
    folder = write_set(tmp_path / "in", saes=LONG, datasets=("gender", "occupation"), edit=with_views)
    page_of(folder, path)
    page = opened(browser, path, width)
    page.evaluate("document.querySelectorAll('details').forEach((box) => { box.open = true; })")
    assert page.evaluate(CUT) == []
