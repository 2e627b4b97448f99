"""From a cell to its rows: lost rows compared with plain NumPy, stored texts, and untrusted texts in a page."""

from __future__ import annotations

import base64
import csv
import gzip
import json

import numpy as np
import pytest
from conftest import people, write_csv, write_sparsify
from result_sets import DEMO, write_set
from runs import Request, files
from test_html_report import browser, opened, page_of  # noqa: F401

from delta_selectivity.api.results import Results
from delta_selectivity.cli import report
from delta_selectivity.errors import RequestError
from delta_selectivity.probing.probe_statistics import ProbeScores
from delta_selectivity.records import scores, texts
from delta_selectivity.records.scores import LayerScores
from delta_selectivity.reporting import row_data, rows
from delta_selectivity.reporting.results import load, result_files
from delta_selectivity.reporting.study import study_of
from delta_selectivity.run.kept_texts import kept_texts
from delta_selectivity.run.rows import RowTable
from delta_selectivity.tasks import UserData, load_probe_texts

N = 60
HOSTILE = '<script>alert(1)</script> <img src=x onerror="alert(2)"> \u202egnp.exe\u202c \x1b[2J =HYPERLINK(1) '
NAMES = ["Ada Lovelace", "Bo Li", "Maximilian von Hohenstein"]


def stored(seed, n=N):
    """Return scores of n rows in two partitions, of persons who occur once, twice or more often."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 2 == 0
    truth = np.where(labels, 1.0, -1.0)
    views = {
        name: (noise * random.normal(size=(2, n)) + truth * strength).astype(np.float16)
        for name, noise, strength in (("model", 0.5, 1.0), ("sae", 0.8, 0.3), ("transfer", 1.0, 0.2))
    }
    persons = np.where(np.arange(n) < 20, np.arange(n) // 5, np.arange(n)).astype(np.int64)
    folds = np.stack([np.arange(n) % 3] * 2).astype(np.int8)
    return ProbeScores(views, labels, persons, np.ones(n), folds)


def write_rows(folder, text=lambda i: f"It was written by {NAMES[i % 3]}", saes=("a/one", "b/two"), kept=True):
    """Write result files of these SAEs with scores, and texts, of layer 1."""
    write_set(folder, saes=saes, layers=range(2))
    for number, path in enumerate(result_files(folder)):
        key = json.loads(path.read_text())["_run"]["key"]
        where = scores.path_of(path, 1)
        scores.save(where, LayerScores(1, scores.key_digest(key), {"gender": stored(number)}))
        found = []
        for i in range(N):
            name = NAMES[i % 3]
            full = f"{i}: {text(i)}"
            start = full.rindex(name)
            found.append(texts.Text(full, start, start + len(name), f"person {i}"))
        if kept:
            own = texts.KeptTexts(key["data"], found, {"gender": np.arange(N)})
            texts.keep(path, texts.to_bytes(own))
    return folder


def by_hand(number):
    """Compute (row, lost, outcome) of every row from the scores alone."""
    found = stored(number)
    model, sae = (found.views[view].astype(float).mean(axis=0) for view in ("model", "sae"))
    told = []
    for i in range(N):
        sign = 1 if found.labels[i] else -1
        right = ((model[i] > 0) == found.labels[i], (sae[i] > 0) == found.labels[i])
        outcome = {(True, False): "lost", (False, True): "gained", (True, True): "both", (False, False): "neither"}[
            right
        ]
        told.append((i, sign * (model[i] - sae[i]), outcome))
    return sorted(told, key=lambda row: (row[2] != "lost", -row[1]))


def test_rows_equal_plain_sums_and_are_sorted_by_loss(tmp_path):
    frame = Results.load(write_rows(tmp_path)).rows("gender", 1, "two")
    expected = by_hand(1)
    assert frame["outcome"].tolist() == [outcome for *_, outcome in expected]
    assert {"lost", "both"} <= set(frame["outcome"])
    np.testing.assert_allclose(frame["lost"], [lost for _, lost, _ in expected])
    assert [int(text.partition(":")[0]) for text in frame["text"]] == [row for row, *_ in expected]
    assert frame["person"].tolist() == [f"person {row}" for row, *_ in expected]
    assert all(text[start:end] == name for text, start, end, name in frame[["text", "start", "end", "name"]].values)
    found = stored(1)
    for place, (row, *_) in enumerate(expected):
        assert frame["model_right"][place] == ((found.views["model"][:, row] > 0) == found.labels[row]).mean()
        assert frame["transfer"][place] == pytest.approx(float(found.views["transfer"][:, row].astype(float).mean()))
        assert frame["label"][place] == ("1" if found.labels[row] else "not 1")


def test_counts_by_class_and_subgroup_and_the_histogram_add_up_to_the_rows(tmp_path):
    files_ = load(result_files(write_rows(tmp_path)))
    found = rows.rows_of(rows.find_cell(files_, "gender", 1, "one"))
    outcomes = [outcome for *_, outcome in by_hand(0)]
    for by, groups in found.counts():
        for place, outcome in enumerate(rows.OUTCOMES):
            assert sum(counts[place] for _, counts in groups) == outcomes.count(outcome), by
    by_group = {by: dict(groups) for by, groups in found.counts()}
    of_length = {name: sum(counts) for name, counts in by_group["length of the name"].items()}
    assert sum(of_length.values()) == N
    often = {name: sum(counts) for name, counts in by_group["times that the texts name it"].items()}
    assert often == {"5 times or more": N}
    end, histogram = found.histogram()
    labels = stored(0).labels
    for label, views in enumerate(histogram):
        assert [sum(bins) for bins in views] == [(labels == bool(label)).sum()] * 2
        score = found.model[labels == bool(label)]
        assert sum(views[0][12:]) == pytest.approx((score >= 0).sum(), abs=0)
    assert end > 0


def test_the_command_prints_rows_and_writes_csv(tmp_path, capsys):
    folder = write_rows(tmp_path / "in", saes=("a/one", "b/two-k8"))
    assert report.main([str(folder), "--rows", "gender", "--layer", "1", "--sae", "k8"]) == 0
    told = capsys.readouterr().out
    first = by_hand(1)[0]
    assert f"{first[1]:+.2f}" in told
    assert "35 more" in told
    assert "not 1: SAE" in told
    out = tmp_path / "rows.csv"
    assert report.main([str(folder), "--rows", "gender/gender", "--layer", "1", "--sae", "k8", "--csv", str(out)]) == 0
    lines = list(csv.DictReader(out.open(encoding="utf-8")))
    assert [float(line["lost"]) for line in lines] == pytest.approx([lost for _, lost, _ in by_hand(1)])
    assert list(lines[0]) == list(rows.COLUMNS)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--rows", "gender", "--layer", "1"], "--sae is missing: name one of a/one, b/two"),
        (["--rows", "gender", "--layer", "1", "--sae", "three"], "there is no SAE 'three'; there are a/one, b/two"),
        (["--rows", "gender", "--layer", "1", "--sae", "_"], "'_' matches several SAEs"),
        (["--rows", "gender", "--sae", "one"], "--layer is missing: gender has layers 0, 1"),
        (["--rows", "gender", "--layer", "7", "--sae", "one"], "--layer 7: gender has layers 0, 1"),
        (["--rows", "age", "--layer", "1", "--sae", "one"], "--rows age: there is no such probe; there are gender"),
        (["--rows", "gender", "--layer", "0", "--sae", "one"], "measure the layer again"),
        (["--rows", "gender", "--layer", "1", "--sae", "one", "--csv", "absent/rows.csv"], "cannot be written"),
        (["--layer", "1"], "--layer needs --rows or --latents"),
        (["--rows", "gender", "--summary"], "cannot be combined with other outputs"),
    ],
)
def test_invalid_cells_are_rejected_with_one_line(flags, told, tmp_path, capsys):
    assert report.main([str(write_rows(tmp_path)), *flags]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith("error: ")


def test_scores_of_another_run_are_rejected(tmp_path):
    folder = write_rows(tmp_path, saes=("one",))
    (path,) = result_files(folder)
    scores.save(scores.path_of(path, 1), LayerScores(1, "another key", {"gender": stored(0)}))
    with pytest.raises(RequestError, match="of another run"):
        Results.load(folder).rows("gender", 1)


def test_texts_are_unchanged_and_damage_is_reported(tmp_path):
    result_file = tmp_path / "m_d.json"
    kept = texts.KeptTexts("a hash", [texts.Text(HOSTILE, 0, 8, "né")], {"gender": np.array([0, 0])})
    content = texts.to_bytes(kept)
    assert content == texts.to_bytes(kept)
    texts.keep(result_file, content)
    path = texts.path_of(result_file)
    found = texts.load(path)
    assert (found.data, list(found.texts), found.rows["gender"].tolist()) == ("a hash", kept.texts, [0, 0])
    for damaged in (content[:-9], content[:40] + b"x" + content[41:], b"", gzip.compress(b"[]"), gzip.compress(b"{}")):
        path.write_bytes(damaged)
        with pytest.raises(RequestError, match="no texts of this program"):
            texts.load(path)
    texts.keep(result_file, None)
    assert list(path.parent.iterdir()) == []
    with pytest.raises(RequestError, match="cannot be read"):
        texts.load(path)


def test_texts_of_other_data_are_not_shown(tmp_path):
    folder = write_rows(tmp_path, saes=("one",))
    (path,) = result_files(folder)
    kept = texts.load(texts.path_of(path))
    texts.keep(path, texts.to_bytes(texts.KeptTexts("of other data", kept.texts, kept.rows)))
    config = json.loads(path.read_text())["_run"]["config"]
    assert config["datasets"], "a public task: its texts are looked up, and are other rows than these"
    frame = Results.load(folder).rows("gender", 1)
    assert frame["text"].isna().all()
    assert len(frame) == N


def test_only_public_texts_are_stored_by_default(tmp_path):
    own = load_probe_texts([UserData(str(write_csv(tmp_path / "mine.csv", people(40))))])
    bundled = load_probe_texts(["politics"], shuffle_select_n=50)
    for found, kept in (
        (own, {"public": [], "all": [0], "none": []}),
        (bundled, {"public": [0], "all": [0], "none": []}),
    ):
        n = len(found.mentions)
        table = RowTable("last", np.arange(n + 1), np.arange(n), np.ones(n, np.float32), np.zeros(n, np.int64))
        for asked, expected in kept.items():
            content = kept_texts(found, table, asked)(0)
            assert [0][: content is not None] == expected, asked
    content = kept_texts(own, table, "all")(0)
    path = tmp_path / "x"
    path.write_bytes(content)
    again = texts.load(path)
    probe = own.datasets[0].probes[0]
    shown = [(again.texts[place].text, again.texts[place].start) for place in again.rows["mine"]]
    assert shown == [(own.mentions[m].text, own.mentions[m].start) for m in probe.mentions]


def test_a_run_stores_or_removes_texts_as_requested(tiny_model, tmp_path):
    sae = write_sparsify(tmp_path / "sae", layers=[1])
    data = write_csv(tmp_path / "mine.csv", people(120))
    request = Request(tiny_model, (sae,), data, tmp_path / "out").plus("--positions", "all")
    assert request.run() == 0
    (path,) = files(tmp_path / "out")
    assert not texts.path_of(path).exists(), "a user's own table"
    assert request.plus("--keep_texts", "--overwrite").run() == 0
    frame = Results.load(tmp_path / "out").rows("mine")
    known = {row["text"]: (row["start"], row["end"], row["label"]) for row in people(120)}
    assert {text: (s, e) for text, s, e in frame[["text", "start", "end"]].values} == {
        text: (s, e) for text, (s, e, _) in known.items()
    }
    assert all((label == "1") == (known[text][2] == 1) for text, label in frame[["text", "label"]].values)
    assert request.plus("--keep_texts", "none", "--overwrite").run() == 0
    assert not texts.path_of(path).exists()


def test_missing_texts_of_a_bundled_task_are_looked_up():
    (file,) = load([DEMO / "tiny-pythia-saes-k8" / "tiny-pythia_wikidata_gender.json"])
    kept = rows.texts_of(file)
    found = load_probe_texts(["gender"])
    probe = found.datasets[0].probes[0]
    assert kept.data == file[1]["_run"]["key"]["data"]
    assert [kept.texts[place].text for place in kept.rows["gender"]] == [found.mentions[m].text for m in probe.mentions]


def unpacked(root):
    (node,) = (node for node in root.all("template") if node.attributes["id"] == "row-data")
    return json.loads(gzip.decompress(base64.b64decode(node.text)))


def test_the_page_holds_the_rows_of_a_cell_in_hundredths(tmp_path):
    _, root = page_of(write_rows(tmp_path / "in"), tmp_path / "r.html")
    found = unpacked(root)
    assert set(found["cells"]) == {"1", "3"}, "those whose scores are beside the files"
    cell = found["cells"]["3"]
    expected = by_hand(1)
    assert [int(found["texts"][place][0].partition(":")[0]) for place in cell["texts"]] == [row for row, *_ in expected]
    model = stored(1).views["model"].astype(float).mean(axis=0)
    np.testing.assert_allclose(cell["scores"][0], [100 * model[row] for row, *_ in expected], atol=1)
    assert all((shown > 0) == (model[row] > 0) for shown, (row, *_) in zip(cell["scores"][0], expected, strict=True))


def test_the_page_reads_the_rows_of_each_cell_once(tmp_path, monkeypatch):
    read, texts_of = [], rows.texts_of
    monkeypatch.setattr(rows, "texts_of", lambda file, fetch: read.append(file[0]) or texts_of(file, fetch))
    page_of(write_rows(tmp_path / "in"), tmp_path / "r.html")
    assert len(read) == len(set(read)) == 2, "each of the two SAEs has scores of one cell"


def test_a_full_page_keeps_the_most_informative_rows(tmp_path, monkeypatch):
    folder = write_rows(tmp_path / "in")
    monkeypatch.setattr(row_data, "TOP", 8)
    monkeypatch.setattr(row_data, "BOTTOM", 2)
    study = study_of(load(result_files(folder)))
    full = len(row_data.packed(study, 10**6, rows.rows_of))
    few = json.loads(gzip.decompress(base64.b64decode(row_data.packed(study, full - 1, rows.rows_of))))
    order = [row for row, *_ in by_hand(1)]
    chosen = [int(few["texts"][place][0].partition(":")[0]) for place in few["cells"]["3"]["texts"]]
    assert chosen == order[:8] + order[-2:]
    assert few["cells"]["3"]["n"] == N
    assert row_data.packed(study, 100, rows.rows_of) is None


def test_long_texts_are_shortened_and_escaped(tmp_path):
    folder = write_rows(
        tmp_path / "in", text=lambda i: f"{HOSTILE * 1000}{i} {NAMES[i % 3]}{HOSTILE * 200}{NAMES[i % 3]}"
    )
    text, root = page_of(folder, tmp_path / "r.html")
    assert len(text) < 1_000_000
    assert len(root.all("script")) == 1
    for before, name, after, _ in unpacked(root)["texts"]:
        assert len(before) <= row_data.BEFORE + 2
        assert len(name) <= row_data.NAME
        assert len(after) <= row_data.AFTER + 2
        assert (before + name + after).isprintable()
    assert any("\\u202e" in before for before, *_ in unpacked(root)["texts"])


def test_a_very_long_name_is_shortened(tmp_path):
    text = texts.Text("x" * 100_000 + " " + "y" * 100_000 + " z" * 50_000, 100_001, 200_001, "p" * 100_000)
    before, name, after = row_data.excerpt(text, 220, 80, 40)
    assert (len(before), len(name), len(after)) == (222, 80, 42)


def test_the_kept_demo_has_the_rows_of_layer_4(tmp_path):
    frame = Results.load(DEMO).rows("gender", 4, "k8")
    found = load([DEMO / "tiny-pythia-saes-k8" / "tiny-pythia_wikidata_gender.json"])[0][1]["layer_4"]["gender"]
    assert len(frame) == found["n_rows"]
    for column, key in (("model_right", "model_sel"), ("sae_right", "sae_sel")):
        assert frame.groupby("label")[column].mean().mean() == pytest.approx(found[key], abs=1e-12)
    assert frame["text"].notna().all()


@pytest.mark.slow
def test_a_click_on_a_heatmap_shows_the_rows_and_the_address_brings_them_back(browser, tmp_path):  # noqa: F811
    folder = write_rows(tmp_path / "in", text=lambda i: f"{HOSTILE}{i} {NAMES[i % 3]} and on")
    path = tmp_path / "report.html"
    page_of(folder, path)
    page = opened(browser, path, 1400)
    page.click("#heatmap_wikidata_gender_b_two [data-cell='3'] >> nth=0", force=True)
    page.wait_for_selector("ol.rows li")
    expected = by_hand(1)
    shown = page.evaluate("[...document.querySelectorAll('ol.rows .figures')].map(one => one.textContent)")
    assert len(shown) == N
    assert shown[0].startswith(f"lost {expected[0][1]:+.2f}"[:8])
    assert page.inner_text("ol.rows li:first-child .outcome") == "▼ lost"
    assert "<script>alert(1)</script>" in page.inner_text("ol.rows li:first-child .text")
    assert not page.query_selector_all("ol.rows script, ol.rows img")
    page.fill("dialog input[type=search]", "bo li")
    assert page.inner_text("dialog output") == f"{N // 3} of {N} rows"
    with page.expect_download() as download:
        page.click("dialog >> text=CSV of all")
    lines = list(csv.DictReader(open(download.value.path(), encoding="utf-8")))  # noqa: PTH123, SIM115
    assert [line["outcome"] for line in lines] == [outcome for *_, outcome in expected]
    url = page.url
    assert page.told == []
    assert page.asked == [path.as_uri()]
    page.close()
    again = opened(browser, path, 400)
    again.goto(url)
    again.wait_for_selector("ol.rows li")
    assert again.inner_text("dialog output") == f"{N // 3} of {N} rows"
    assert again.evaluate("document.querySelector('dialog').scrollWidth <= window.innerWidth")
    again.keyboard.press("Escape")
    assert "cell" not in again.evaluate("location.hash")
    assert again.told == []
