"""The leaderboard: ranks with ties, filters that do not change ranks, and a page without requests or errors."""

from __future__ import annotations

import re

import numpy as np
import pytest
from result_sets import DEMO, write_changed, write_set
from test_html_report import Tree, browser, opened  # noqa: F401 - a fixture

import delta_selectivity as ds
from delta_selectivity.cli import report
from delta_selectivity.records import result_file
from delta_selectivity.reporting.leaderboard import boards_of
from delta_selectivity.reporting.results import load, result_files

N = 40


def made_up(folder, n=N, reach=2.5, layers=(3,), hostile=False):
    """Return SAEs whose transfer_r2 falls by 0.01 each, with significant differences from the third neighbour on."""
    names = [f"org/sae-{number:02}" for number in range(n)]
    if hostile:
        names[0] = '<script>alert(1)</script> & "x" \'y'
    write_set(folder / "in", saes=names, layers=layers)
    for number, path in enumerate(sorted((folder / "in").rglob("*.json"))):
        level = result_file.read(path)["_run"]["sae_level"]
        for found in level["compared"].values():
            middle = found["transfer_r2"]
            found |= {"transfer_r2_ci_low": middle - reach / 100, "transfer_r2_ci_high": middle + reach / 100}
        width = 2048 * 4 ** (number % 3)
        config = {"d_sae": {str(layer): width for layer in layers}}
        write_changed(path, folder / "out" / path.parent.name / path.name, config=config, level=level)
    return folder / "out"


def board(folder, out):
    assert report.main([str(folder), "--leaderboard", str(out)]) == 0
    return out.read_text("utf-8")


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forty")
    path = folder / "board.html"
    return path, board(made_up(folder, hostile=True), path)


def rows_of(text):
    return [row for row in Tree(text).root.all("tr") if row.all("td")]


def test_ranks_ties_and_numbers_are_those_of_the_paired_differences(forty):
    rows = rows_of(forty[1])
    assert len(rows) == N
    for number, row in enumerate(rows):
        rank, name, r2, interval, _, _, width, _, n_probes = row.all("td")[:1] + row.all("th") + row.all("td")[1:]
        first, last = max(number - 1, 1), min(number + 3, N)  # two neighbours on each side are ties
        assert rank.all("b")[0].text == f"{first}–{last}"
        assert f"tied with {last - first}: " in rank.text
        assert name.text == (f"org_sae-{number:02}" if number else name.text)
        value = 0.8 - 0.01 * number
        assert r2.text == f"{value:.3f}"
        assert interval.text.strip() == f"{value - 0.003:.3f} to {value + 0.003:.3f}"
        assert width.text.replace(",", "") == row.attributes["data-width"] == str(2048 * 4 ** (number % 3))
        assert n_probes.text == "1"
    assert "pairs of SAEs differ significantly" in forty[1]


def test_the_leaderboard_escapes_names_and_makes_no_requests(forty):
    root = Tree(forty[1]).root
    assert len(root.all("script")) == 1
    assert "alert(1)" not in root.all("script")[0].text
    assert not re.findall(r"https?://", forty[1])
    assert not [tag for tag in ("link", "img", "iframe") if root.all(tag)]


def test_every_control_has_a_name_and_every_table_a_caption(forty):
    root = Tree(forty[1]).root
    controls = [node for tag in ("select", "input") for node in root.all(tag)]
    labelled = [node for label in root.all("label") for tag in ("select", "input") for node in label.all(tag)]
    assert len(controls) == 4
    assert {id(node) for node in controls} == {id(node) for node in labelled}
    assert all(label.text.strip() for label in root.all("label"))
    assert [caption.text for caption in root.all("caption")] == [
        "tiny-pythia · resid_post · layer 3: 40 SAEs by rank"
    ] or ("layer 3: 40 SAEs by rank" in root.all("caption")[0].text)
    assert all(svg.attributes["aria-hidden"] == "true" for svg in root.all("svg"))
    assert {head.attributes["scope"] for head in root.all("th")} == {"col", "row"}


def test_each_layer_has_its_own_board(tiny_model, tmp_path):
    """In two runs of several layers, the paired differences of the layer itself decide, not the run's means."""
    from conftest import people, write_csv, write_sparsify

    task = write_csv(tmp_path / "people.csv", people(120))
    folders = [write_sparsify(tmp_path / f"k{k}", layers=[0, 1], k=k) for k in (2, 8, 16)]
    settings = ds.Settings(folds=3, repeats=2, whole_tokens=500)
    for i, some in enumerate((folders[:2], folders[2:])):
        ds.evaluate(tiny_model, some, task, settings=settings, device="cpu", output=tmp_path / "runs" / str(i))
    paths = [path for folder in sorted((tmp_path / "runs").iterdir()) for path in result_files(folder)]
    boards = list(boards_of(load(paths)))
    assert [board.layer for board in boards] == [0, 1]
    for one in boards:
        assert len(one.ranking.pairs) == 3
        assert {sae.label for sae in one.study.saes} == {"k2", "k8", "k16"}
    alone = ds.evaluate(tiny_model, folders, task, layers=1, settings=settings, device="cpu")
    for one in boards[1:]:
        for pair in one.ranking.pairs:
            found = alone.compare(pair.one.label, pair.other.label).transfer_r2
            assert pair.is_significant == (found.low > 0 or found.high < 0)
            assert found.value >= 0
        for sae in one.study.saes:
            (level,) = [
                found["_run"]["sae_level"]
                for _, found in alone.files
                if found["_run"]["config"]["sae_label"] == sae.label
            ]
            assert np.allclose(
                sae.overall("transfer_r2"), [level[f"transfer_r2{e}"] for e in ("", "_ci_low", "_ci_high")]
            )
            assert sae.files[0][1]["_run"]["config"]["d_sae"] == {"0": 96, "1": 96}


def test_a_board_without_scores_has_no_ranks(tmp_path):
    for path in DEMO.rglob("*gender.json"):
        write_changed(path, tmp_path / "in" / path.parent.name / path.name)
    rows = rows_of(board(tmp_path / "in", tmp_path / "board.html"))
    assert len(rows) == 12
    assert {row.all("td")[0].text for row in rows} == {"–"}
    (k8,) = (found for path, found in load(result_files(tmp_path / "in")) if "k8" in str(path))
    shown = {row.all("td")[1].text for row in rows if "k8" in row.all("th")[0].text}
    assert shown == {f"{k8[f'layer_{layer}']['gender']['transfer_r2']:.3f}" for layer in range(6)}


def test_impossible_leaderboards_are_one_line(tmp_path, capsys):
    folder = write_set(tmp_path / "in", saes=(), baselines=[("mean", "resid_post")])
    assert report.main([str(folder), "--leaderboard", str(tmp_path / "x.html")]) == 2
    assert "the files hold only baselines" in capsys.readouterr().err
    assert report.main([str(DEMO), "--leaderboard", str(tmp_path / "in" / "no" / "x.html")]) in (0, 2)
    assert report.main([str(DEMO), "--leaderboard", "x.html", "--csv", "y.csv"]) == 2
    assert "--leaderboard cannot be combined with other outputs" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 400])
def test_a_browser_shows_the_leaderboard_without_errors_or_requests(width, forty, browser):  # noqa: F811
    page = opened(browser, forty[0], width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.inner_text("#count") == "40 of 40 SAEs"
    page.select_option("#width", "8192")
    assert page.inner_text("#count") == "13 of 40 SAEs"
    page.fill("#l0-high", "40")
    visible = "[...document.querySelectorAll('.board tbody tr')].filter(row => row.getClientRects().length)"
    shown = page.evaluate(f"{visible}.map(row => Number(row.dataset.l0))")
    assert shown
    assert max(shown) <= 40
    assert page.inner_text("#count") == f"{len(shown)} of 40 SAEs"
    first = page.evaluate(f"{visible}[0].cells[0].innerText")
    assert first.startswith("1–4"), "filters leave ranks alone: this is the second of all"
    page.click("button[type=reset]")
    page.wait_for_function("document.getElementById('count').textContent === '40 of 40 SAEs'")
    page.focus("#board")
    for expected in ("l0-low", "l0-high", "width"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == expected
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "scroll lists", "the table scrolls by keyboard"
    names = page.evaluate("[...document.querySelectorAll('select, input')].map(one => one.labels[0].innerText.trim())")
    assert [name.split("\n")[0].split("  ")[0] for name in names][1:3] == ["L0 from", "to"]
    assert page.told == []
    assert page.asked == [forty[0].as_uri()]
