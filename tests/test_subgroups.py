"""Losses by subgroup: compared with plain sums, and corrected for multiple comparisons."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from test_rows import write_rows

from delta_selectivity.api.results import Results
from delta_selectivity.cli import report
from delta_selectivity.errors import RequestError
from delta_selectivity.probing.probe_statistics import ProbeScores
from delta_selectivity.records.texts import KeptTexts, Text
from delta_selectivity.reporting.people_table import read_people
from delta_selectivity.reporting.subgroups import (
    MIN_PEOPLE,
    Grouping,
    grouping_of,
    groupings,
    losses,
    mean_losses,
    times_named,
    with_q_values,
)

N = 1200


def world(seed, hurt=0.0):
    """Return scores of people with one row each, the first half rare: 10 % of all are lost, more of the rare ones."""
    random = np.random.default_rng(seed)
    labels = np.arange(N) % 2 == 0
    model = np.where(labels, 1.0, -1.0) * np.where(random.random(N) < 0.9, 1, -1) * np.ones((2, 1))
    rare = np.arange(N) < N // 2
    flips = random.random(N) < 0.1 + hurt * rare
    sae = np.where(flips, -model, model)
    views = {"model": model.astype(np.float16), "sae": sae.astype(np.float16)}
    folds = np.stack([random.integers(0, 5, N) for _ in range(2)]).astype(np.int8)
    found = ProbeScores(views, labels, np.arange(N, dtype=np.int64), np.ones(N), folds)
    return found, Grouping("rarity", ("rare", "frequent"), np.where(rare, 0, 1))


def test_a_groups_loss_is_compared_with_all_others():
    found, by = world(0, hurt=0.2)
    frequent, rare = with_q_values(losses(found, [by]))
    right = {view: ((scores > 0) == found.labels).mean(axis=0) for view, scores in found.views.items()}
    change = right["sae"] - right["model"]
    means = [change[by.group == place].mean() for place in (0, 1)]  # both classes have the same size in both groups
    assert (rare.delta_sel.value, frequent.delta_sel.value) == pytest.approx(means)
    assert rare.against.value == pytest.approx(means[0] - means[1])
    assert rare.against.value == -frequent.against.value
    spread = np.sqrt(sum(change[by.group == place].var() / (N / 2) for place in (0, 1)))
    assert rare.against.standard_error == pytest.approx(spread, rel=0.15)
    assert rare.q_value < 0.001
    assert (rare.n_rows, rare.n_people) == (N // 2, N // 2)


def test_equal_losses_are_rarely_significant():
    p_values = [losses(*_one(world(seed)))[0].against.p_value for seed in range(100)]
    assert 0 <= np.mean(np.array(p_values) < 0.05) <= 0.12
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def _one(made):
    return made[0], [made[1]]


def test_q_values_correct_for_all_comparisons():
    found, by = world(1, hurt=0.05)
    alone = with_q_values(losses(found, [by]))
    names = tuple(map(str, range(10)))
    many = [Grouping(str(i), names, np.random.default_rng(i).integers(0, 10, N)) for i in range(5)]
    among = with_q_values(losses(found, [by, *many]))
    assert among[0].against == alone[0].against
    assert among[0].q_value > alone[0].q_value
    expected = stats.false_discovery_control([loss.against.p_value for loss in among])
    np.testing.assert_allclose([loss.q_value for loss in among], expected)


def test_a_group_with_too_few_people_has_no_loss():
    found, _ = world(2)
    few = np.where(np.arange(N) < 2 * MIN_PEOPLE - 2, 0, 1)
    assert losses(found, [Grouping("few", ("few", "rest"), few)]) == []


def test_names_are_counted_without_case_and_punctuation():
    sentences = ["It was ADA LOVELACE, said Bo", "ada lovelace and Lovelace", "Ada; Lovelace!", "Bo Li", "nobody: Li"]
    names = ["ADA LOVELACE", "ada lovelace", "Ada; Lovelace", "Bo Li", "Li"]
    kept = KeptTexts(
        "", [Text(s, s.index(n), s.index(n) + len(n), n) for s, n in zip(sentences, names, strict=True)], {}
    )
    assert times_named(kept).tolist() == [3, 3, 3, 1, 2]


def test_a_person_is_in_one_group():
    found, _ = world(3)
    persons = np.repeat(np.arange(N // 2), 2)
    names = ["Bo Li" if i % 2 else "Ada von Lovelace" for i in range(N)]
    kept = KeptTexts("", [Text(name, 0, len(name), "p") for name in names], {})
    scores = ProbeScores(found.views, found.labels, persons, found.weights, found.folds)
    for by in groupings(scores, kept, np.arange(N)):
        assert all(len(set(by.group[persons == person])) == 1 for person in range(20))
    (by_person,) = groupings(scores, None, None)
    assert set(by_person.group) == {1}


def test_groups_of_the_caller_in_the_data_frame(tmp_path):
    results = Results.load(write_rows(tmp_path))
    decades = {f"person {i}": f"{1900 + 10 * (i // 2 % 2)}s" for i in range(60) if i >= 20}
    frame = results.subgroups("gender", by={"born": decades})
    assert set(frame["sae"]) == {"a/one", "b/two"}
    assert set(frame["layer"]) == {1}, "the layer whose scores are there"
    assert frame["q_value"].tolist() == pytest.approx(stats.false_discovery_control(frame["p_value"]).tolist())
    kept = KeptTexts("", [Text("Bo", 0, 2, "a"), Text("Li", 0, 2, "b"), Text("Xu", 0, 2, "c")], {})
    by = grouping_of("born", {"a": "1900s", "b": "1890s"}, kept, np.array([0, 1, 2, 0]))
    assert (by.names, by.group.tolist()) == (("1890s", "1900s"), [1, 0, -1, 1])
    assert len(results.subgroups("gender", sae="one")) * 2 == len(results.subgroups("gender"))


def test_a_mean_over_cells_counts_a_person_once(tmp_path):
    found, by = world(4, hurt=0.1)
    other, _ = world(5)
    cells = [(found, [by])], [(found, [by])] * 2, [(found, [by]), (other, [by])]
    (_, alone), (_, twice), (rest, both) = map(mean_losses, cells)
    assert (twice.n_cells, twice.n_rows, twice.n_people) == (2, N, N // 2)
    assert (twice.delta_sel, twice.against) == (alone.delta_sel, alone.against)
    rare = by.group == 0
    changes = [
        (((cell.views["sae"] > 0) == cell.labels) * 1.0 - ((cell.views["model"] > 0) == cell.labels)).mean(axis=0)
        for cell in (found, other)
    ]
    mean = np.mean(changes, axis=0)  # both classes have the same size in both groups
    assert both.delta_sel.value == pytest.approx(mean[rare].mean())
    assert both.against.value == pytest.approx(mean[rare].mean() - mean[~rare].mean())
    spread = np.sqrt(sum(mean[of].var() / of.sum() for of in (rare, ~rare)))
    assert both.against.standard_error == pytest.approx(spread, rel=0.15)
    assert rest.against.value == pytest.approx(-both.against.value)


def people_file(folder, text, name="people.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_of_people_gives_groups_and_decades(tmp_path):
    path = people_file(
        tmp_path,
        "born,name,from\n1815,Ada Lovelace,UK\n1912-06-23,Alan M. Turing,UK\n,Nobody Known,\n1990.0,Bo Li,China\n"
        "about 1700,Xu Li,\n1931,John Smith,US\n1955,John Smith,US\n" + "1900,Some One,US\n" * 9,
    )
    found = read_people(path)
    assert found["born"]["ada lovelace"] == "1810s"
    assert found["born"]["m turing"] == found["born"]["Alan M. Turing"] == "1910s", (
        "as Wikidata rows have it, and whole"
    )
    assert found["born"]["bo li"] == "1990s"
    assert not {"nobody known", "xu li", "john smith"} & set(found["born"])
    assert found["from"]["john smith"] == "US"
    assert "nobody known" not in found["from"]
    assert read_people(people_file(tmp_path, "person\tborn\nBo\t-350\n", "people.tsv"))["born"]["Bo"] == "-350s"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("who,born\nBo,1900\n", "needs a column person or name"),
        ("name\nBo\n", "columns that group people"),
        ("", "no table of people"),
        ('name,born\n"Bo,1900\n', "no table of people"),
        ("name,job\n" + "".join(f"Bo {i},job {i}\n" for i in range(61)), "column job has 61 different values"),
    ],
)
def test_invalid_tables_of_people_are_one_line(tmp_path, content, told):
    path = people_file(tmp_path, content)
    with pytest.raises(RequestError, match=told) as error:
        read_people(path)
    assert "\n" not in str(error.value)
    for broken in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(RequestError, match=r"cannot be read|no table"):
            read_people(broken)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="no table of people"):
        read_people(path)


def test_means_over_cells_from_python_the_command_line_and_the_page(tmp_path, capsys):
    folder = write_rows(tmp_path)
    path = people_file(tmp_path, "name,born\n" + "".join(f"person {i},{1900 + 10 * (i // 2 % 2)}\n" for i in range(60)))
    frame = Results.load(folder).subgroups(by=path, mean=True)
    assert list(frame.columns[:4]) == ["sae", "by", "group", "n_cells"]
    assert {"born", "length of the name"} & set(frame["by"])
    cells = Results.load(folder).subgroups(by=path)
    for _, line in frame.iterrows():
        own = cells[(cells["sae"] == line["sae"]) & (cells["by"] == line["by"]) & (cells["group"] == line["group"])]
        assert len(own) == line["n_cells"]
        assert own["delta_sel"].mean() == pytest.approx(line["delta_sel"])
    assert report.main([str(folder), "--subgroups", "--people", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "born: 1900s" in shown
    assert report.main([str(folder), "-o", str(tmp_path / "page.html"), "--people", str(path)]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Losses by subgroup" in page
    assert "at least 10 effective people" in page
    for wrong in (["--people", str(path)], ["--subgroups", "--csv", "x.csv"], ["--subgroups", "--people", "none.csv"]):
        assert report.main([str(folder), *wrong]) == 2
    assert capsys.readouterr().err.count("error:") == 3
