"""The page and the plots: every number of the files, no requests, for any names and any number of SAEs."""

from __future__ import annotations

import base64
import csv
import doctest
import gzip
import hashlib
import importlib
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from result_sets import DEMO, write_set

from delta_selectivity.cli import report
from delta_selectivity.records.verdicts import MARKS
from delta_selectivity.reporting import matrix, output, results, styles
from delta_selectivity.reporting.cell_table import COLUMNS
from delta_selectivity.reporting.plots import plots_of
from delta_selectivity.reporting.study import study_of

ROOT = DEMO.parent.parent
HOSTILE = '<script>alert(1)</script> & "$x_" \'\x1b[2J\n=1+1'
VOID = {"input", "meta"}


class Node:
    """An element of the page."""

    def __init__(self, tag, attributes):
        self.tag, self.attributes, self.children = tag, dict(attributes), []

    def all(self, tag):
        found = [self] if self.tag == tag else []
        return found + [node for child in self.children if isinstance(child, Node) for node in child.all(tag)]

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Tree(HTMLParser):
    """A strict parser of the page: every element must be closed by its own tag."""

    def __init__(self, text):
        super().__init__()
        self.root = Node("root", {})
        self._open = [self.root]
        self.feed(text)
        self.close()
        assert self._open == [self.root], "an element was left open"

    def handle_starttag(self, tag, attrs):
        node = Node(tag, attrs)
        assert len(node.attributes) == len(attrs), "an attribute twice"
        self._open[-1].children.append(node)
        if tag not in VOID:
            self._open.append(node)

    def handle_startendtag(self, tag, attrs):
        self._open[-1].children.append(Node(tag, attrs))

    def handle_endtag(self, tag):
        assert self._open.pop().tag == tag.lower()

    def handle_data(self, data):
        self._open[-1].children.append(data)


def study_in(folder):
    return study_of(results.load(results.result_files(folder)))


def page_of(folder, out):
    assert report.main([str(folder), "-o", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    return text, Tree(text).root


def plots_in(folder):
    return {plot.name: plot for plot in plots_of(study_in(folder))}


def lines(plot):
    return list(csv.DictReader(io.StringIO(plot.csv())))


def cell_rows(root):
    """Return the lines of the table of all cells by (SAE, dataset, probe, layer); each maps column -> element."""
    (data,) = (node for node in root.all("template") if node.attributes.get("id") == "cell-data")
    names = [column.name for column in COLUMNS]
    rows = [dict(zip(names, map(entry, line), strict=False)) for line in json.loads(data.text)]
    return {(*(row[name].text for name in ("SAE", "dataset", "probe")), int(row["layer"].text)): row for row in rows}


def entry(value):
    text, key, *small = value if isinstance(value, list) else (value, value)
    node = Node("td", {"data-v": "" if key is None else str(key)})
    node.children = [" ".join([text, *small])]
    return node


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return page_of(DEMO, tmp_path_factory.mktemp("demo") / "report.html")


def test_the_table_has_every_cell_of_the_demo(demo):
    rows = cell_rows(demo[1])
    assert len(rows) == 144
    for sae in study_in(DEMO).saes:
        for cell in sae.cells:
            row = rows[sae.label, cell.dataset, cell.probe, cell.layer]
            for name in ("model_sel", "sae_sel", "delta_sel", "transfer_r2"):
                assert float(row[name].attributes["data-v"]) == cell.result[name]
            assert float(row["q"].attributes["data-v"]) == cell.result["q_value"]
            assert float(row["fvu_pos"].attributes["data-v"]) == cell.figures["fvu_pos"]
            shown = row["delta_sel"].text.replace("−", "-").replace(" to ", " ").split()
            exact = [cell.result[name] for name in ("delta_sel", "ci_low", "ci_high")]
            assert [float(number) for number in shown] == [round(number, 3) for number in exact]


def test_the_summary_of_the_demo_has_the_numbers_of_the_files(demo):
    for _, found in results.load(results.result_files(DEMO)):
        level = found["_run"]["sae_level"]
        for score, digits in (("delta_sel", 4), ("transfer_r2", 3)):
            numbers = [level[score], level[f"{score}_ci_low"], level[f"{score}_ci_high"]]
            for number in numbers:
                assert f"{number:.{digits}f}".replace("-", "−") in demo[1].text


def test_the_page_shows_settings_and_versions(demo):
    run = results.load(results.result_files(DEMO))[0][1]["_run"]
    text = demo[1].text
    for told in (run["commit"], run["started"], run["key"]["dtype"], run["versions"]["torch"], "2 SAEs · 5 datasets"):
        assert told in text
    assert "5 partitions into 5 folds by group, seed 0" in text
    assert "Incomplete" not in text


def test_the_page_makes_no_requests(demo):
    text, root = demo
    addresses = set(re.findall(r"""https?://[^\s"'<>)]+""", text))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "names, not addresses"
    assert not [tag for tag in ("link", "img", "iframe", "object", "embed", "base", "form") if
                any({"src", "href", "data", "action"} & node.attributes.keys() for node in root.all(tag))]  # fmt: skip
    targets = [node.attributes["href"] for node in root.all("a")]
    assert all(target.startswith(("#", "data:image/svg+xml", "data:text/csv")) for target in targets)
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in targets if target[0] == "#"} <= set(ids)


def test_the_page_allows_only_its_own_script(demo):
    (script,) = demo[1].all("script")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    policy = next(node.attributes["content"] for node in demo[1].all("meta") if "http-equiv" in node.attributes)
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy


def test_plots_in_the_page_have_titles_text_and_links_to_their_numbers(demo):
    plots = plots_in(DEMO)
    figures = {figure.attributes["id"]: figure for figure in demo[1].all("figure")}
    assert figures.keys() == plots.keys()
    for name, plot in plots.items():
        (svg,) = figures[name].all("svg")
        assert svg.attributes["role"] == "img"
        assert svg.children[0].text == plot.title
        assert svg.children[1].text == plot.description
        links = {link.attributes["download"]: link.attributes["href"] for link in figures[name].all("a")}
        saved = {file: base64.b64decode(link.partition(",")[2]).decode() for file, link in links.items()}
        assert saved[f"{name}.csv"] == plot.csv()
        assert ElementTree.fromstring(saved[f"{name}.svg"]).tag == "{http://www.w3.org/2000/svg}svg"


def test_the_page_is_reproducible(demo, tmp_path):
    assert page_of(DEMO, tmp_path / "again.html")[0] == demo[0]


def test_the_plots_are_the_same_whatever_style_the_user_has_set(tmp_path):
    def drawn():
        return {name: plot.svg() for name, plot in plots.items()}

    plots = plots_in(write_set(tmp_path / "in"))
    plain = drawn()
    styled = {"figure.constrained_layout.use": True, "axes.facecolor": "red", "font.size": 20}
    with matplotlib.rc_context(styled), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawn() == plain


def test_a_heatmap_prints_every_value_and_marks_what_is_not_significant():
    plot = plots_in(DEMO)["heatmap_wikidata_occupation_tiny-pythia-saes-k32"]
    tree = ElementTree.fromstring(plot.svg())
    weights = {
        text.text: any(weight in text.get("style", "") for weight in ("bold", "700"))
        for text in tree.iter("{http://www.w3.org/2000/svg}text")
        if re.fullmatch(r"[+−]\d\.\d{3} [=→▼?]", text.text)
    }
    found = [line for line in lines(plot) if round(float(line["delta_sel"]), 3)]
    assert len(found) >= 25
    for line in found:
        shown = f"{float(line['delta_sel']):+.3f} {MARKS[line['verdict']]}".replace("-", "−")
        assert weights[shown] == (float(line["q_value"]) < 0.05)
    assert {line["verdict"] for line in found} == {"lost", "undecided"}
    significant = sum(float(line["q_value"]) < 0.05 for line in lines(plot))
    assert plot.svg().count("fill: url(#h") == len(lines(plot)) - significant > 0
    assert f"{significant} of 30 cells" in plot.description


def test_the_page_opens_with_sentences_made_from_the_numbers(demo, tmp_path):
    (opening,) = (node for node in demo[1].all("ul") if node.attributes.get("class") == "opening")
    ranked, kept, lost, undecided = (line.text for line in opening.all("li"))
    assert ranked.startswith("Ranked: transfer_r2 is highest for tiny-pythia-saes-k32 (0.778)")
    cells = [(sae, cell) for sae in study_in(DEMO).saes for cell in sae.cells]
    n_lost = sum(cell.verdict == "lost" for _, cell in cells)
    assert kept.startswith("Preserved: none of 144 cells")
    assert lost.startswith(f"Lost: {n_lost} of 144 cells are lost")
    sae, worst = min(cells, key=lambda placed: placed[1].result["delta_sel"])
    assert f"the largest loss is {worst.probe}, layer {worst.layer} of {sae.label}" in lost
    unknown = sum(cell.result["model_ci_low"] <= 0.5 for _, cell in cells)
    assert undecided.startswith(f"Undecided: {144 - n_lost} of 144 cells are undecided; most often ")
    assert f"In {unknown} of them the model itself is not shown to know the answer" in undecided

    def kept_and_moved(cells):
        well = {"model_ci_low": 0.7, "preserved": True, "q_value": 0.9, "transfer_preserved": True}
        turned = {"transfer_preserved": False, "transfer_delta": -0.2, "transfer_q_value": 0.001}
        return {"kept": {**cells["gender"], **well}, "turned": {**cells["gender"], **well, **turned}}

    _, root = page_of(write_set(tmp_path / "in", edit=kept_and_moved), tmp_path / "report.html")
    (opening,) = (node for node in root.all("ul") if node.attributes.get("class") == "opening")
    assert [line.text for line in opening.all("li")] == [
        "Preserved: 3 of 6 cells are preserved.",
        "Lost: no cell is shown to be lost; "
        "3 moved (a probe fitted anew finds the answer, but the model's own probe does not).",
        "Undecided: none of 6 cells.",
    ]


def test_cell_numbers_have_contrast_and_the_scale_is_even():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for step in range(-20, 21):
        colour = matrix.colour_of(step / 20, 1.0)
        light, dark = sorted((luminance(colour), luminance(matrix.text_colour_on(colour))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    assert luminance(matrix.colour_of(0, 1.0)) > 0.9
    assert [matrix.scale_end(value) for value in (0.0, 0.04, 0.0401, 0.152)] == pytest.approx([0.04, 0.04, 0.08, 0.16])


def test_series_differ_in_colour_and_marker():
    looks = [styles.series(index) for index in range(48)]
    assert len(set(looks)) == 48
    assert all(a.colour != b.colour and a.marker != b.marker for a, b in itertools.pairwise(looks))


def test_all_plots_as_files_with_the_numbers_of_the_json(tmp_path, capsys):
    write_set(tmp_path / "in", saes=("a/one", "a/two"), datasets=("gender", "athlete"))
    assert report.main([str(tmp_path / "in"), "--plots", str(tmp_path / "out" / "plots")]) == 0
    files = sorted((tmp_path / "out" / "plots").iterdir())
    study = study_in(tmp_path / "in")
    plots = {plot.name: plot for plot in plots_of(study)}
    assert [path.name for path in files] == sorted(f"{n}.{end}" for n in plots for end in ("csv", "png", "svg"))
    assert f"{len(plots)} in" in capsys.readouterr().out
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".png":
            assert content.startswith(b"\x89PNG\r\n")
        elif path.suffix == ".svg":
            assert ElementTree.fromstring(content).get("role") == "img"
        else:
            assert content.decode() == plots[path.stem].csv()
    by_place = {(s.label, c.dataset, c.probe, c.layer): c.result for s in study.saes for c in s.cells}
    seen = 0
    for name, plot in plots.items():
        for line in lines(plot) if name.startswith("heatmap") else []:
            result = by_place[line["sae"], line["dataset"], line["probe"], int(line["layer"])]
            for key in ("delta_sel", "ci_low", "ci_high", "p_value", "q_value"):
                assert float(line[key]) == result[key]
            seen += 1
    assert seen == len(by_place) == 30
    for line in lines(plots["levels_wikidata_gender_gender_a_one"]):
        of = "a_one" if line["view"] == "model" else line["sae"]
        result = by_place[of, line["dataset"], line["probe"], int(line["layer"])]
        view = line["view"]
        assert float(line["balanced_accuracy"]) == result[f"{view}_sel"]
        assert float(line["ci_high"]) == result[f"{view}_ci_high"]
    pareto = lines(plots["delta_against_fvu"])
    level = study.saes[0].level
    assert float(pareto[0]["delta_sel"]) == level["delta_sel"]
    assert float(pareto[0]["ci_low"]) == level["delta_sel_ci_low"]
    assert [float(line["difference"]) for line in lines(plots["differences_delta_sel"])] == [
        level["compared"]["a/two"]["delta_sel"]
    ]


def test_a_page_of_one_sae(tmp_path):
    folder = write_set(tmp_path / "in")
    text, root = page_of(folder, tmp_path / "report.html")
    assert "Against each other" not in text
    assert len(cell_rows(root)) == 3
    assert not [name for name in plots_in(folder) if name.startswith(("differences", "rivals"))]


def test_a_page_of_twelve_saes(tmp_path):
    names = [f"EleutherAI/sae-of-a-model-with-a-long-name-{width}k" for width in range(12)]
    folder = write_set(tmp_path / "in", saes=names)
    _, root = page_of(folder, tmp_path / "report.html")
    assert len(cell_rows(root)) == 36
    plots = plots_in(folder)
    assert len(lines(plots["rivals_delta_sel"])) == 12 * 11
    assert len(lines(plots["mean_delta_sel"])) == 12
    panels = [plot for name, plot in plots.items() if name.startswith("levels")]
    assert len(panels) == 3, "four SAEs share a panel"
    assert {line["sae"] for plot in panels for line in lines(plot)} == {"model", *(n.replace("/", "_") for n in names)}
    assert sum(name.startswith("heatmap") for name in plots) == 12


@pytest.mark.parametrize("layers", [[11], range(48)], ids=["one layer", "48 layers"])
def test_a_page_of_few_or_many_layers(layers, tmp_path):
    folder = write_set(tmp_path / "in", layers=layers)
    _, root = page_of(folder, tmp_path / "report.html")
    assert [layer for *_, layer in cell_rows(root)] == list(layers)
    svg = plots_in(folder)["heatmap_wikidata_gender_one"].svg()
    assert all(f">{layer}</text>" in svg for layer in layers)


def test_baselines_are_drawn_with_their_saes(tmp_path):
    baselines = [("mean", "resid_post"), ("random", "a_one"), ("random", "a_two")]
    folder = write_set(tmp_path / "in", saes=("a/one", "a/two"), baselines=baselines)
    text, root = page_of(folder, tmp_path / "report.html")
    assert len(cell_rows(root)) == 15
    plots = plots_in(folder)
    for label in ("a_one", "a_two"):
        plot = plots[f"levels_wikidata_gender_gender_{label}"]
        assert {line["sae"] for line in lines(plot)} == {"model", label, "mean", "random"}
    assert "baseline: random of a_two" in text
    assert [name for name in plots if name.startswith("heatmap")] == [
        "heatmap_wikidata_gender_a_one", "heatmap_wikidata_gender_a_two"
    ]  # fmt: skip
    assert {line["sae"] for line in lines(plots["delta_against_l0"])} >= {"baseline: mean of resid_post"}
    assert "random</text>" in plots["delta_against_l0"].svg()


def test_baselines_alone_are_shown_in_full(tmp_path):
    folder = write_set(tmp_path / "in", saes=(), baselines=[("mean", "resid_post")])
    _, root = page_of(folder, tmp_path / "report.html")
    assert len(cell_rows(root)) == 3
    assert sum(name.startswith("heatmap") for name in plots_in(folder)) == 1


def test_a_probe_without_numbers_shows_its_reason(tmp_path):
    reason = "only 3 people in <one> class"

    def edit(cells):
        return {**cells, "rare": {"reason": reason}}

    folder = write_set(tmp_path / "in", edit=edit)
    _, root = page_of(folder, tmp_path / "report.html")
    row = cell_rows(root)["one", "wikidata_gender", "rare", 0]
    assert row["delta_sel"].text == reason
    assert row["verdict"].text == "– not measured"
    plots = plots_in(folder)
    assert f"layer 0, rare: not measured ({reason})" in Tree(plots["heatmap_wikidata_gender_one"].svg()).root.text
    assert not [name for name in plots if name.startswith("levels") and "rare" in name]


def test_a_page_without_any_measured_cell(tmp_path):
    folder = write_set(tmp_path / "in", edit=lambda cells: {"rare": {"reason": "too few"}}, sae_level={"compared": {}})
    _, root = page_of(folder, tmp_path / "report.html")
    assert len(cell_rows(root)) == 3


def without_q(cells):
    return {name: {key: value for key, value in cell.items() if "q_value" not in key} for name, cell in cells.items()}


def test_an_incomplete_run_is_flagged_and_claims_nothing(tmp_path, capsys):
    folder = write_set(tmp_path / "in", edit=without_q, complete=False, sae_level={"compared": {}})
    _, root = page_of(folder, tmp_path / "report.html")
    (notice,) = (node for node in root.all("div") if "notice" in (node.attributes.get("class") or ""))
    assert "1 of 1 result files are incomplete" in notice.text
    assert "sae-00/tiny-pythia_wikidata_gender.json" in notice.text
    assert {row["verdict"].text for row in cell_rows(root).values()} == {"? undecided"}
    assert "0 of 3" in root.text
    capsys.readouterr()
    assert report.main([str(folder), "--summary"]) == 0
    assert capsys.readouterr().out.count("0 of 3") == 2, "no loss counts before there are q values"


def test_warnings_of_the_run_are_shown_once_with_their_files(tmp_path):
    folder = write_set(tmp_path / "in", saes=("a/one", "a/two"), warnings=["3 fits <of> layer 2 did not converge"])
    _, root = page_of(folder, tmp_path / "report.html")
    (notice,) = (node for node in root.all("div") if "notice" in (node.attributes.get("class") or ""))
    assert notice.text.startswith("Warning: 3 fits <of> layer 2 did not converge2 files")


def test_names_from_data_are_escaped(tmp_path):
    folder = write_set(
        tmp_path / "in", saes=(HOSTILE, "b/two"), edit=lambda cells: {HOSTILE: cells["gender"]}, warnings=[HOSTILE]
    )
    text, root = page_of(folder, tmp_path / "report.html")
    assert len(root.all("script")) == 1
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\n", "\\n")
    assert {probe for _, _, probe, _ in cell_rows(root)} == {shown}
    assert "\x1b" not in text
    for plot in plots_in(folder).values():
        assert ElementTree.fromstring(plot.svg()) is not None
        assert plot.png().startswith(b"\x89PNG")
        assert re.fullmatch(r"[A-Za-z0-9._-]+", plot.name)
        assert not any(cell.startswith("=") for line in lines(plot) for cell in line.values())


def test_saes_with_the_same_short_name_are_distinguished(tmp_path):
    folder = write_set(tmp_path / "in", saes=("/x/sae", "sae"))
    labels = [sae.label for sae in study_in(folder).saes]
    assert len(set(labels)) == 2


def test_datasets_of_several_models_are_distinguished(tmp_path):
    folder = write_set(tmp_path / "in", saes=("a/one", "a/two"))
    path = results.result_files(folder)[0]
    content = json.loads(path.read_text())
    content["_run"]["config"]["model_name"] = "org/other"
    content["_run"]["key"]["model"] = "of other weights"
    path.write_text(json.dumps(content))
    path.rename(path.with_name("org_other_wikidata_gender.json"))
    datasets = study_in(folder).datasets
    assert list(datasets) == ["wikidata_gender (org_other)", "wikidata_gender (tiny-pythia)"]


def test_a_model_measured_differently_has_its_own_curve(tmp_path):
    def other_seed(cells):
        return {name: {**cell, "model_sel": cell["model_sel"] + 0.01} for name, cell in cells.items()}

    first, second = write_set(tmp_path / "a", saes=("a/one",)), write_set(tmp_path / "b", ("a/two",), edit=other_seed)
    files = results.load([*results.result_files(first), *results.result_files(second)])
    (panel,) = (plot for plot in plots_of(study_of(files)) if plot.name.startswith("levels"))
    of_model = {line["sae"]: float(line["balanced_accuracy"]) for line in lines(panel) if line["view"] == "model"}
    assert len(of_model) == 2
    assert max(of_model.values()) - min(of_model.values()) == pytest.approx(0.01)


def test_flags_of_files_and_tables_are_exclusive(tmp_path):
    assert report.main([str(DEMO), "-o", str(tmp_path / "report.html"), "--csv", str(tmp_path / "all.csv")]) == 2
    assert not list(tmp_path.iterdir())


def test_a_too_large_page_omits_download_links(tmp_path, monkeypatch, capsys):
    folder = write_set(tmp_path / "in")
    monkeypatch.setattr(output, "MAX_BYTES", len(page_of(folder, tmp_path / "full.html")[0].encode()) - 1)
    capsys.readouterr()
    text, root = page_of(folder, tmp_path / "report.html")
    assert "data:text/csv" not in text
    assert root.all("svg")
    assert not root.all("figcaption")
    assert "use --plots to write them" in capsys.readouterr().out


def test_a_page_that_is_still_too_large_compresses_its_plots(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "MAX_BYTES", 1000)
    _, root = page_of(write_set(tmp_path / "in"), tmp_path / "report.html")
    assert not root.all("svg")
    (data,) = (node for node in root.all("template") if node.attributes["id"] == "plot-data")
    packed = json.loads(gzip.decompress(base64.b64decode(data.text)))
    places = {figure.attributes["data-plot"]: figure.attributes["style"] for figure in root.all("figure")}
    assert places.keys() == packed.keys() == plots_in(tmp_path / "in").keys()
    for name, svg in packed.items():
        width, height = (Tree(svg).root.all("svg")[0].attributes[size] for size in ("width", "height"))
        assert places[name] == f"width: {width}px; height: {height}px"


@pytest.mark.parametrize("flags", [("-o", "absent/report.html"), ("-o", "."), ("--plots", "file/plots")])
def test_unwritable_outputs_are_invalid_requests(flags, tmp_path, monkeypatch, capsys):
    write_set(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert report.main(["in", *flags]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert flags[1] in told
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_results_and_other_schemas_are_reported(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert report.main([str(tmp_path / "empty"), "-o", str(tmp_path / "r.html")]) == 2
    assert "empty: no result files: run the program first" in capsys.readouterr().err
    assert report.main([str(tmp_path / "nothing")]) == 2
    assert "nothing: there is no such folder" in capsys.readouterr().err
    folder = write_set(tmp_path / "in", saes=("a/one", "a/two"))
    path = results.result_files(folder)[0]
    content = json.loads(path.read_text())
    content["_run"]["schema_version"] = 1
    path.write_text(json.dumps(content))
    assert report.main([str(folder), "-o", str(tmp_path / "r.html")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert path.name in told
    assert "schema" in told
    assert set(cell_rows(Tree((tmp_path / "r.html").read_text(encoding="utf-8")).root)) == {
        ("a_two", "wikidata_gender", "gender", layer) for layer in range(3)
    }


def test_tables_do_not_import_matplotlib():
    code = "import sys; from delta_selectivity.cli.report import main; main(['results/demo', '--summary']); "
    code += "assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("name", ["html", "numbers", "series"])
def test_doctests_of_reporting_pass(name):
    found = doctest.testmod(importlib.import_module(f"delta_selectivity.reporting.{name}"))
    assert found.attempted
    assert not found.failed


SETS = {
    "1 SAE": {"datasets": ("gender", "occupation")},
    "12 SAEs": {"saes": [f"EleutherAI/sae-pythia-160m-32k-{n}" for n in range(12)], "layers": range(12)},
    "baselines": {"saes": ("a/one", "a/two"), "baselines": [("mean", "resid_post"), ("random", "a_one")]},
}

WORDS_OUTSIDE = """
    [...document.querySelectorAll("figure svg text")].filter((text) => {
        const [word, plot] = [text, text.closest("svg")].map((one) => one.getBoundingClientRect());
        const across = word.left < plot.left - 2 || word.right > plot.right + 2;
        return across || word.top < plot.top - 2 || word.bottom > plot.bottom + 2;
    }).map((text) => text.textContent)
"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -r requirements-dev.txt")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip("no browser: apt-get install chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser, path, width, **options):
    """Open the page in a window of this width, and record its requests and console messages."""
    page = browser.new_page(viewport={"width": width, "height": 900}, **options)
    page.asked, page.told = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.told.append(message.text))
    page.on("pageerror", lambda error: page.told.append(str(error)))
    page.goto(path.as_uri())
    return page


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", SETS)
def test_a_browser_shows_the_page_without_errors_or_requests(name, width, browser, tmp_path):
    path = tmp_path / "report.html"
    page_of(write_set(tmp_path / "in", **SETS[name]), path)
    page = opened(browser, path, width)
    assert page.evaluate("document.documentElement.scrollWidth") == width, "no sideways scrolling of the page"
    shown = page.evaluate("[...document.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect().height)")
    assert min(shown) > 30
    outside = page.evaluate(WORDS_OUTSIDE)
    assert outside == [], "every word lies within its plot"
    assert page.screenshot(full_page=True).startswith(b"\x89PNG")
    assert page.asked == [path.as_uri()]
    assert page.told == []


@pytest.mark.slow
def test_the_table_sorts_and_filters(browser, tmp_path):
    path = tmp_path / "report.html"
    page_of(write_set(tmp_path / "in", saes=("a/one", "a/two"), datasets=("gender", "occupation")), path)
    page = opened(browser, path, 1280)
    column = next(index for index, column in enumerate(COLUMNS) if column.name == "delta_sel")
    values = f"[...document.querySelectorAll('#cells tbody tr')].map(row => Number(row.cells[{column}].dataset.v))"
    unsorted = page.evaluate(values)
    page.click("#cells thead button >> text=delta_sel")
    assert page.evaluate(values) == sorted(unsorted) != unsorted
    page.click("#cells thead button >> text=delta_sel")
    assert page.evaluate(values) == sorted(unsorted, reverse=True)
    assert page.get_attribute("#cells th[aria-sort=descending]", "scope") == "col"
    visible = "[...document.querySelectorAll('#cells tbody tr')].filter(row => row.getClientRects().length).length"
    assert page.evaluate(visible) == len(unsorted) == 36
    page.select_option("select[data-column='0']", "a_two")
    assert (page.evaluate(visible), page.inner_text("#count")) == (18, "18 of 36")
    page.fill("#search", "singer")
    assert (page.evaluate(visible), page.inner_text("#count")) == (3, "3 of 36")
    assert page.told == []


@pytest.mark.slow
def test_plots_are_saved_from_the_page(browser, tmp_path):
    path = tmp_path / "report.html"
    page_of(write_set(tmp_path / "in"), path)
    page = opened(browser, path, 1280)
    name = "heatmap_wikidata_gender_one"
    for kind, start in (("SVG", b"<svg "), ("PNG", b"\x89PNG"), ("CSV", b"sae,dataset,layer")):
        with page.expect_download() as download:
            page.click(f"#{name} figcaption >> text={kind}")
        saved = download.value
        assert saved.suggested_filename == f"{name}.{kind.lower()}"
        assert Path(saved.path()).read_bytes().startswith(start)
    assert page.asked == [path.as_uri()]
    assert page.told == []


@pytest.mark.slow
def test_the_page_has_a_dark_mode_and_prints_light(browser, tmp_path):
    path = tmp_path / "report.html"
    page_of(write_set(tmp_path / "in"), path)
    page = opened(browser, path, 1280, color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(20, 23, 27)"
    page.emulate_media(media="print")
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    assert not page.is_visible("nav")
    assert page.pdf().startswith(b"%PDF")


@pytest.mark.slow
def test_many_cells_are_fast_and_the_state_is_in_the_url(browser, tmp_path):
    path = tmp_path / "report.html"
    names = [f"org/sae-{number:02}" for number in range(20)]
    sets = ("gender", "occupation", "politics", "athlete", "is_alive")
    page_of(write_set(tmp_path / "in", saes=names, layers=range(24), datasets=sets), path)
    assert path.stat().st_size < 5_000_000
    page = opened(browser, path, 1400)
    known = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert known < 2000, "milliseconds until it is loaded"
    assert page.inner_text("#count") == "5760 of 5760"
    assert page.evaluate("document.querySelectorAll('*').length") < 15_000, "of 5760 lines some dozens are drawn"
    page.evaluate("document.getElementById('all-cells').scrollIntoView()")
    line = "[...document.querySelectorAll('#cells tbody tr:not([aria-hidden])')].map(row => row.ariaRowIndex)"
    page.evaluate("document.querySelector('.tall').scrollTop = 1e7")
    page.wait_for_function(f"{line}.includes('5761')")
    page.click("#cells thead button >> text=delta_sel")
    page.select_option("select[data-column='2']", "is_singer")
    page.fill("#search", "sae-07")
    assert page.inner_text("#count") == "24 of 5760"
    url = page.url
    shown = page.inner_text("#cells tbody")
    page.close()
    again = opened(browser, path, 1400)
    again.goto(url)
    again.reload()
    assert (again.inner_text("#count"), again.inner_text("#cells tbody")) == ("24 of 5760", shown)
    again.evaluate("document.getElementById('dataset-3').scrollIntoView()")
    again.wait_for_selector("#dataset-3 figure svg")
    again.click("#dataset-3 [data-cell] >> nth=1", force=True)
    again.wait_for_selector("dialog dl")
    assert (page.told, again.told) == ([], [])
    assert set(again.asked) == {path.as_uri()} or all(one.startswith(path.as_uri()) for one in again.asked)


@pytest.mark.slow
def test_in_a_frame_of_a_notebook_it_filters_and_its_links_stay_inside(browser, tmp_path):
    write_set(tmp_path / "in", saes=("a/one", "a/two"), datasets=("gender", "occupation"))
    path = tmp_path / "notebook.html"
    code = "import sys; from pathlib import Path; from shared import show_page; "
    code += "Path(sys.argv[2]).write_text('<h1>notebook</h1>' + show_page(sys.argv[1]).data, 'utf-8')"
    subprocess.run([sys.executable, "-c", code, tmp_path / "in", path], check=True, cwd=ROOT / "explore")
    page = opened(browser, path, 1280)
    (frame,) = page.frames[1:]
    frame.fill("#search", "singer")
    assert frame.inner_text("#count") == "6 of 36"
    frame.click("nav a >> nth=-1")
    assert frame.url.startswith("about:srcdoc#")
    frame.wait_for_function("scrollY > 0")
    assert page.told == []
