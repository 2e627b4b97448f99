"""Tasks, labels, people and draws: compared with counts of the data, then properties, then errors."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets as hf_datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from delta_selectivity import tasks as dw
from delta_selectivity.errors import RequestError
from delta_selectivity.tasks import catalogue, wikidata
from delta_selectivity.tasks.people import name_span, person_key
from delta_selectivity.tasks.selection import select_rows
from delta_selectivity.tasks.types import Mention, ProbeSpec, Row, RowSet, Task


@pytest.fixture(scope="module")
def wikidata_texts() -> dw.ProbeTexts:
    return dw.load_probe_texts(None)


def probe_of(texts: dw.ProbeTexts, name: str) -> dw.Probe:
    return next(probe for dataset in texts.datasets for probe in dataset.probes if probe.name == name)


def names_with_labels(texts: dw.ProbeTexts, probe: dw.Probe) -> dict[str, set[bool]]:
    found: dict[str, set[bool]] = defaultdict(set)
    for index, label in zip(probe.mentions, probe.labels, strict=True):
        mention = texts.mentions[index]
        found[mention.text[mention.start : mention.end]].add(bool(label))
    return found


# --- names of datasets


def test_parse_accepts_indices_names_and_all_and_drops_duplicates() -> None:
    assert dw.parse_dataset_names("0,1,politics, 0 ,Gender") == ("gender", "occupation", "politics")
    assert dw.parse_dataset_names("4") == ("is_alive",)
    assert dw.parse_dataset_names("wikidata") == dw.DATASET_NAMES == dw.parse_dataset_names("all", wikidata_only=True)


def test_a_loader_is_all_that_a_new_task_takes(monkeypatch):
    rows = tuple(Row(Mention(f"a text about {who}", 13, 14, who), str(who in "ab")) for who in "abcd")
    task = Task("jobs", "jobs", (RowSet(rows, (ProbeSpec("is_job", "True"),)),), is_public=True, family="people")
    monkeypatch.setitem(catalogue.LOADERS, "jobs", lambda: task)
    assert dw.parse_dataset_names("0,Jobs,5") == ("gender", "jobs", dw.parse_dataset_names("5")[0])
    assert dw.load_task("jobs") is task
    assert [line.split()[:4] for line in dw.describe_datasets(["jobs"]).splitlines()[1:2]] == [
        ["-", "jobs", "people", "is_job"]
    ]
    with pytest.raises(RequestError, match=r"4 is_alive, .*jobs, .*wikidata"):
        dw.parse_dataset_names("nothing_like_it")


@pytest.mark.parametrize("spec", ["999", "1000", "-1", "sport", "0,999", "0.5"])
def test_parse_errors_name_the_valid_datasets(spec: str) -> None:
    with pytest.raises(RequestError, match=r"0 gender, 1 occupation, 2 politics, 3 athlete, 4 is_alive") as error:
        dw.parse_dataset_names(spec)
    assert "\n" not in str(error.value)
    assert spec.split(",")[-1] in str(error.value)


@pytest.mark.parametrize("spec", ["", " ", ",,"])
def test_parse_rejects_an_empty_request(spec: str) -> None:
    with pytest.raises(RequestError, match="names no dataset"):
        dw.parse_dataset_names(spec)


# --- the Wikidata tasks


def test_wikidata_counts(wikidata_texts: dw.ProbeTexts) -> None:
    rows = {probe.name: len(probe.labels) for dataset in wikidata_texts.datasets for probe in dataset.probes}
    assert rows["gender"] == 3345
    assert rows["is_alive"] == 3377
    assert rows["politics"] == 1931
    assert rows["plays_football"] == rows["plays_basketball"] == rows["plays_baseball"] == 1680
    prompts = {
        wikidata_texts.mentions[index].text
        for dataset in wikidata_texts.datasets
        for probe in dataset.probes
        if not probe.name.startswith("plays_")
        for index in probe.mentions
    }
    assert len(prompts) == 10_723
    assert [dataset.slug for dataset in wikidata_texts.datasets] == [f"wikidata_{n}" for n in dw.DATASET_NAMES]


def test_wikidata_mentions_are_distinct_and_shared_between_datasets(wikidata_texts: dw.ProbeTexts) -> None:
    texts = [mention.text for mention in wikidata_texts.mentions]
    assert len(set(texts)) == len(texts) == len(wikidata_texts.persons)
    used = [set(probe.mentions.tolist()) for dataset in wikidata_texts.datasets for probe in dataset.probes]
    assert set.union(*used) == set(range(len(texts)))
    assert sum(map(len, used)) > len(texts) + 4529  # prompts recur across files


def test_wikidata_probes_hold_each_mention_once_and_both_classes(wikidata_texts: dw.ProbeTexts) -> None:
    for dataset in wikidata_texts.datasets:
        for probe in dataset.probes:
            assert len(np.unique(probe.mentions)) == len(probe.mentions) == len(probe.labels)
            assert probe.mentions.dtype == np.int64 and probe.labels.dtype == np.bool_
            assert 0.3 < probe.labels.mean() < 0.51


@pytest.mark.parametrize(
    ("probe", "name", "label"),
    [
        ("gender", "Anna Boden", True),
        ("gender", "John Travolta", False),
        ("politics", "Ted Kennedy", True),
        ("politics", "Elaine Chao", False),
        ("is_athlete", "Honus Wagner", True),
        ("is_athlete", "Arundhati Roy", False),
        ("plays_football", "Franco Harris", True),
        ("plays_basketball", "Shaquille O'Neal", True),
        ("plays_baseball", "Jackie Robinson", True),
        ("plays_baseball", "Shaquille O'Neal", False),
        ("is_alive", "Georg Büchner", False),
        ("is_alive", "Lucy Liu", True),
    ],
)
def test_wikidata_labels_have_the_right_direction(
    wikidata_texts: dw.ProbeTexts, probe: str, name: str, label: bool
) -> None:
    assert names_with_labels(wikidata_texts, probe_of(wikidata_texts, probe)).get(name) == {label}


def test_occupation_probes_read_their_own_files(wikidata_texts: dw.ProbeTexts) -> None:
    # compared with the files themselves, because a swapped file would still look plausible
    stems = {"59": "journalist", "61": "actor", "62": "politician", "63": "singer", "64": "researcher"}
    for number, occupation in stems.items():
        rows = wikidata._read_rows(f"{number}_wikidata_occupation_is{occupation}")
        truth = {row.mention.text: row.value == "1" for row in rows}
        probe = probe_of(wikidata_texts, f"is_{occupation}")
        texts = [wikidata_texts.mentions[index].text for index in probe.mentions]
        assert dict(zip(texts, probe.labels.tolist(), strict=True)) == truth


def test_sports_share_their_rows_and_exclude_each_other(wikidata_texts: dw.ProbeTexts) -> None:
    probes = [probe_of(wikidata_texts, f"plays_{sport}") for sport in ("football", "basketball", "baseball")]
    assert all(np.array_equal(probe.mentions, probes[0].mentions) for probe in probes)
    assert np.array_equal(np.sum([probe.labels for probe in probes], axis=0), np.ones(1680))


def test_every_wikidata_span_is_the_name_at_the_end(wikidata_texts: dw.ProbeTexts) -> None:
    for mention in wikidata_texts.mentions:
        assert mention.end == len(mention.text)
        assert len(mention.text[mention.start :].split()) <= 2
        assert mention.text[mention.start].isprintable() and not mention.text[mention.start].isspace()


def test_one_person_has_one_id(wikidata_texts: dw.ProbeTexts) -> None:
    ids: dict[str, set[int]] = defaultdict(set)
    keys: dict[int, set[str]] = defaultdict(set)
    for mention, person in zip(wikidata_texts.mentions, wikidata_texts.persons.tolist(), strict=True):
        # counted independently of people.py: by the letters of the last two words
        spelled = re.sub(r"[^a-z ]", "", " ".join(mention.text.casefold().split()[-2:]))
        ids[spelled].add(person)
        keys[person].add(mention.person)
    assert max(len(found) for spelled, found in ids.items() if spelled.isascii() and len(spelled) > 8) == 1
    assert all(len(found) == 1 for found in keys.values())
    politics = probe_of(wikidata_texts, "politics")
    assert 990 < len(np.unique(wikidata_texts.persons[politics.mentions])) < 1030


def test_table_lists_every_probe_with_its_counts() -> None:
    lines = dw.describe_datasets(["gender", "politics"]).splitlines()
    assert lines[3] == ""
    assert re.search(r"^0 +gender +people +gender +5000 +3345 +0 +3330 .* 1666 \(50%\) +female +737$", lines[1])
    assert re.search(r"^2 +politics .* 3000 +1931 +0 +1004 +person +2 +965 \(50%\) +Democratic Party +878$", lines[2])


# --- people


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("as told by Barack Obama", "Barack Obama"),
        ("as told by Barack Obama \n ", "Barack Obama"),
        ("as told by \u00adBarack Obama", "Barack Obama"),
        ("  Nenê", "Nenê"),
        ("Terminator (Linda Hamilton", "Linda Hamilton"),
        ("Earl Lloyd, Darryl Dawkins,Moses Malone", "Moses Malone"),
        ("automatically liberates others.--Marianne Williamson", "Marianne Williamson"),
        ("If...Andrew Jackson", "Andrew Jackson"),
        ("08:08:04 +0000Steve Horn", "Steve Horn"),
        ("by Gov.Gina Raimondo", "Gina Raimondo"),
        ("J.K. Rowling", "J.K. Rowling"),
        ("Whitney North Seymour, Jr.", "Seymour, Jr."),
        ("with 2 Chainz", "2 Chainz"),
        ("by Félix Houphouët-Boigny", "Félix Houphouët-Boigny"),
        ("村上 春樹", "村上 春樹"),
        ("नरेन्द्र मोदी", "नरेन्द्र मोदी"),
    ],
)
def test_name_span(text: str, name: str) -> None:
    span = name_span(text)
    assert span is not None
    assert text[slice(*span)] == name


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_text_without_a_word_has_no_name(text: str) -> None:
    assert name_span(text) is None


@pytest.mark.parametrize(
    "spellings",
    [
        ("Barack Obama", "BARACK OBAMA", "Barack Obama's", "Barack Obama’s", "Barack\u00a0Obama,", '"Barack Obama."'),
        ("J.K. Rowling", "JK Rowling"),
        ("Iván Rodríguez", "Ivan Rodriguez", "Iva\u0301n Rodri\u0301guez"),
        ("Jean-Paul Sartre", "Jean\u00adPaul Sartre"),
        ("Franz Strauß", "Franz STRAUSS"),
    ],
)
def test_person_key_ignores_how_a_name_is_written(spellings: tuple[str, ...]) -> None:
    assert len({person_key(spelling) for spelling in spellings}) == 1


def test_person_key_keeps_people_apart() -> None:
    names = ["Ted Kennedy", "Ed Kennedy", "F. Kennedy", "Kennedy", "村上 春樹", "村上 龍", "***", "!!!"]
    assert len({person_key(name) for name in names}) == len(names)


# --- duplicates and draws


def mention(text: str) -> Mention:
    return Mention(text=text, start=0, end=len(text), person=text)


def source(*sets: tuple[str, dict[str, int]]) -> Task:
    """Return row sets, each (probe prefix, {value: rows})."""
    return Task(
        "toy",
        "toy",
        tuple(
            RowSet(
                tuple(Row(mention(f"{prefix} {v} {i}"), v) for v, count in values.items() for i in range(count)),
                tuple(ProbeSpec(f"{prefix}_{v}", v) for v in values),
            )
            for prefix, values in sets
        ),
    )


def test_duplicates_and_conflicting_labels_are_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_csv(tmp_path, [("a b", 0), ("a b", 0), ("c d", 1), ("e f", 1), ("e f", 0), ("g h", 0)])
    texts = own(path)
    assert [m.text for m in texts.mentions] == ["a b", "c d", "g h"]
    assert texts.datasets[0].probes[0].labels.tolist() == [False, True, False]
    assert "dropped 1 texts with two labels" in caplog.text


@pytest.mark.parametrize("name", ["gender", "occupation", "athlete"])
def test_draw_is_balanced_nested_and_within_n(name: str) -> None:
    drawn = {}
    for n in (100, 101, 200):
        texts = dw.load_probe_texts([name], shuffle_select_n=n, seed=3)
        dataset = texts.datasets[0]
        sets = {probe.mentions.tobytes(): probe for probe in dataset.probes}
        assert sum(len(probe.labels) for probe in sets.values()) == n
        sizes = [len(probe.labels) for probe in sets.values()]
        assert max(sizes) - min(sizes) <= 1
        for probe in dataset.probes:
            classes = 3 if probe.name.startswith("plays_") else 2
            assert abs(probe.labels.sum() - len(probe.labels) / classes) < 1
        drawn[n] = {(p.name, texts.mentions[i].text) for p in dataset.probes for i in p.mentions}
    assert drawn[100] < drawn[101] < drawn[200]


def test_draw_depends_on_the_seed_and_on_nothing_else() -> None:
    def fingerprint(names: list[str], seed: int) -> str:
        texts = dw.load_probe_texts(names, shuffle_select_n=80, seed=seed)
        return dw.dataset_fingerprint(texts, next(d for d in texts.datasets if d.name == "politics"))

    state = np.random.get_state()[1].tolist()  # noqa: NPY002 - the global generator must stay untouched
    alone = fingerprint(["politics"], 1)
    assert alone == fingerprint(["politics"], 1) == fingerprint(["gender", "politics"], 1)
    assert alone != fingerprint(["politics"], 2)
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002


def test_draw_larger_than_the_data_keeps_every_row(wikidata_texts: dw.ProbeTexts) -> None:
    texts = dw.load_probe_texts(["politics"], shuffle_select_n=10**9)
    politics = next(dataset for dataset in wikidata_texts.datasets if dataset.name == "politics")
    assert dw.dataset_fingerprint(texts, texts.datasets[0]) == dw.dataset_fingerprint(wikidata_texts, politics)


def test_draw_continues_with_the_majority_class() -> None:
    rows = select_rows(source(("p", {"0": 50, "1": 5})), 20, seed=0).row_sets[0].rows
    assert sorted(row.value for row in rows) == ["0"] * 15 + ["1"] * 5


def test_draw_uses_all_of_a_small_set() -> None:
    kept = select_rows(source(("a", {"0": 3, "1": 3}), ("b", {"0": 40, "1": 40})), 46, seed=0)
    assert [len(row_set.rows) for row_set in kept.row_sets] == [6, 40]


@pytest.mark.parametrize(("name", "n", "least"), [("gender", 1, 2), ("occupation", 9, 10), ("athlete", 5, 6)])
def test_a_too_small_draw_reports_the_minimum(name: str, n: int, least: int) -> None:
    with pytest.raises(RequestError, match=f"`shuffle_select_n` {n} .* at least {least} rows"):
        dw.load_probe_texts([name], shuffle_select_n=n)
    dw.load_probe_texts([name], shuffle_select_n=least)


@pytest.mark.parametrize("n", [0, -1])
def test_an_empty_draw_is_rejected(n: int) -> None:
    with pytest.raises(RequestError, match=f"at least 1, got {n}"):
        dw.load_probe_texts(["gender"], shuffle_select_n=n)


# --- fingerprint


def test_the_fingerprint_depends_on_text_span_label_and_person(tmp_path: Path) -> None:
    def fingerprint(text: str = "a b", label: int = 0, group: str = "g", end: int = 3) -> str:
        rows = [{"text": text, "label": label, "group": group, "start": 0, "end": end}]
        rows += [{"text": "c", "label": 1, "group": "h", "start": 0, "end": 1}]
        rows += [{"text": "d", "label": 0, "group": "h", "start": 0, "end": 1}]
        path = write_jsonl(tmp_path, rows)
        texts = own(path)
        return dw.dataset_fingerprint(texts, texts.datasets[0])

    same = fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", same) and same == fingerprint()
    others = [fingerprint(text="a c"), fingerprint(label=1), fingerprint(group="i"), fingerprint(end=1)]
    assert len({same, *others}) == 5


# --- Gurnee et al.'s own folders

BOS = PAD = 0
LENGTH = 12


def gurnee_record(text: list[int], name: str, name_length: int, surname_length: int, value: str) -> dict[str, Any]:
    """Return a record as `probing_datasets/wikidata.py` of their repository makes it."""
    tokens = [BOS, *text[-(LENGTH - 1) :]]
    end = len(tokens) - 1
    tokens = tokens + [PAD] * (LENGTH - len(tokens))
    padding = "<|endoftext|>" * tokens[1:].count(PAD)  # they also decode the padding into the text
    return {
        "text": f"words {text} {name}{padding}",
        "tokens": tokens,
        "name": name,
        "name_index_start": end + 1 - name_length,
        "name_index_end": end,
        "surname_index_start": end + 1 - surname_length,
        "surname_index_end": end,
        "class": value,
    }


def write_gurnee(folder: Path, records: list[dict[str, Any]]) -> None:
    table = hf_datasets.Dataset.from_list(records)
    table.set_format(type="torch", columns=["tokens"], output_all_columns=True)
    table.save_to_disk(str(folder))


@pytest.fixture
def gurnee_dir(tmp_path: Path) -> Path:
    gender = [
        gurnee_record([5, 6, 7, 8], "Ada Byron", 2, 1, "female"),
        gurnee_record(list(range(20, 50)), "Max Born", 3, 2, "male"),  # cut on the left, without padding
        gurnee_record([9, 10], "Max  BORN", 2, 1, "male"),  # only the name
        gurnee_record([5, 6, 7, 8], "Ada Byron", 2, 1, "female"),  # a duplicate
        gurnee_record([5, 0, 7, 8], "Eva Peron", 2, 1, "female"),  # id 0 inside the text is not padding
    ]
    write_gurnee(tmp_path / "wikidata_sorted_sex_or_gender.pyth.128.6000", gender)
    jobs = ["actor", "journalist", "politician", "researcher", "singer", "athlete"]
    occupation = [gurnee_record([60 + i, 70 + i], f"A {job}", 1, 1, job) for i, job in enumerate(jobs)]
    write_gurnee(tmp_path / "wikidata_sorted_occupation.pyth.128.6000", occupation)
    sports = ["American football player", "basketball player", "baseball player", "association football player"]
    athletes = [gurnee_record([80 + i, 90 + i], f"B {sport}", 1, 1, sport) for i, sport in enumerate(sports)]
    write_gurnee(tmp_path / "wikidata_sorted_occupation_athlete.pyth.128.5000", athletes)
    return tmp_path


def same(persons) -> list[int]:
    """Return, for each row, the first row of the same person."""
    return [persons.tolist().index(person) for person in persons]


def test_gurnee_tokens_are_stripped_of_bos_and_padding(gurnee_dir: Path) -> None:
    texts = dw.load_probe_texts([dw.GurneeData(name, gurnee_dir) for name in ["gender"]])
    assert [m.token_ids for m in texts.mentions] == [
        (5, 6, 7, 8),
        tuple(range(39, 50)),
        (9, 10),
        (5, 0, 7, 8),
    ]
    assert [m.token_span for m in texts.mentions] == [(2, 3), (8, 10), (0, 1), (2, 3)]
    assert [m.person for m in texts.mentions] == ["ada byron", "max born", "max born", "eva peron"]
    assert same(texts.persons) == [0, 1, 1, 3]
    assert texts.datasets[0].slug == "wikidata_gender"
    assert texts.datasets[0].probes[0].labels.tolist() == [True, False, False, True]
    for m in texts.mentions:
        assert m.text.endswith(m.text[m.start : m.end]) and "endoftext" not in m.text


def test_gurnee_occupations_are_one_against_the_rest(gurnee_dir: Path) -> None:
    texts = dw.load_probe_texts([dw.GurneeData(name, gurnee_dir) for name in ["occupation", "athlete"]])
    occupation, athlete = texts.datasets
    assert [probe.name for probe in occupation.probes] == [
        "is_actor",
        "is_journalist",
        "is_politician",
        "is_researcher",
        "is_singer",
    ]
    assert [probe.labels.tolist().index(True) for probe in occupation.probes] == [0, 1, 2, 3, 4]
    names = ["is_athlete", "plays_football", "plays_basketball", "plays_baseball", "plays_soccer"]  # no hockey here
    assert [probe.name for probe in athlete.probes] == names
    assert names_with_labels(texts, athlete.probes[1])["B American football player"] == {True}
    assert names_with_labels(texts, athlete.probes[4])["B American football player"] == {False}
    assert names_with_labels(texts, athlete.probes[0])["A athlete"] == {True}
    assert len(texts.mentions) == 10  # is_athlete uses the mentions of the occupation folder


def test_gurnee_missing_folder_lists_what_is_there(gurnee_dir: Path) -> None:
    with pytest.raises(RequestError, match=r"wikidata_sorted_political_party.* found .*sex_or_gender\.pyth\.128\.6000"):
        dw.load_probe_texts([dw.GurneeData(name, gurnee_dir) for name in ["gender", "politics"]])
    with pytest.raises(RequestError, match="no such folder"):
        dw.load_probe_texts([dw.GurneeData(name, gurnee_dir / "nowhere") for name in ["gender"]])


def test_gurnee_two_folders_for_one_property_are_refused(gurnee_dir: Path) -> None:
    (gurnee_dir / "wikidata_sorted_sex_or_gender.gpt2.128.6000").mkdir()
    with pytest.raises(RequestError, match="remove one"):
        dw.load_probe_texts([dw.GurneeData(name, gurnee_dir) for name in ["gender"]])


def test_gurnee_positions_in_the_padding_are_refused(tmp_path: Path) -> None:
    record = gurnee_record([5, 6], "Ada Byron", 2, 1, "female") | {"surname_index_end": 7}
    write_gurnee(tmp_path / "wikidata_sorted_sex_or_gender.pyth.128.6000", [record])
    with pytest.raises(RequestError, match=r"row 1: the name 'Ada Byron' is at tokens 1 to 7, outside 1 to 2"):
        dw.load_probe_texts([dw.GurneeData(name, tmp_path) for name in ["gender"]])


def test_other_folders_are_rejected_as_gurnee_data(tmp_path: Path) -> None:
    folder = tmp_path / "wikidata_sorted_is_alive.pyth.128.6000"
    folder.mkdir()
    with pytest.raises(RequestError, match="not a folder written by datasets"):
        dw.load_probe_texts([dw.GurneeData(name, tmp_path) for name in ["is_alive"]])
    hf_datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(folder))
    with pytest.raises(RequestError, match="no column 'name'"):
        dw.load_probe_texts([dw.GurneeData(name, tmp_path) for name in ["is_alive"]])


# --- the user's own file


def write_csv(folder: Path, rows: list[tuple[Any, ...]], header: tuple[str, ...] = ("text", "label")) -> Path:
    path = folder / "my_task.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def own(path: Path, split: str | None = None, columns: str = "") -> dw.ProbeTexts:
    """Return the dataset of the user's file alone."""
    return dw.load_probe_texts([dw.UserData(str(path), split, dw.parse_columns(columns))])


def write_jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "my_task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ROWS: list[dict[str, Any]] = [
    {"text": "I saw Paris ", "label": 1, "group": "fr", "start": 6, "end": 12},
    {"text": "I saw Rome", "label": 0, "group": "it", "start": 6, "end": 10},
    {"text": "Lyon is big", "label": 1, "group": "fr", "start": 0, "end": 4},
]


def user_formats(folder: Path) -> dict[str, Path]:
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, folder / "my_task.parquet")
    hf_datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "my_task"))
    return {
        "csv": write_csv(folder, [tuple(row.values()) for row in ROWS], tuple(ROWS[0])),
        "jsonl": write_jsonl(folder, ROWS),
        "parquet": folder / "my_task.parquet",
        "folder": folder / "my_task",
    }


def test_every_format_of_a_user_file_reads_the_same(tmp_path: Path) -> None:
    loaded = {kind: own(path) for kind, path in user_formats(tmp_path).items()}
    for texts in loaded.values():
        assert [d.name for d in texts.datasets] == [d.slug for d in texts.datasets] == ["my_task"]
        assert [m.text[m.start : m.end] for m in texts.mentions] == ["Paris", "Rome", "Lyon"]
        assert same(texts.persons) == [0, 1, 0]
        assert texts.datasets[0].probes[0].labels.tolist() == [True, False, True]
    assert len({dw.dataset_fingerprint(texts, texts.datasets[0]) for texts in loaded.values()}) == 1


def test_a_user_file_may_be_combined_with_named_datasets(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, ROWS)
    texts = dw.load_probe_texts(["politics", dw.UserData(str(path))])
    assert [dataset.slug for dataset in texts.datasets] == ["wikidata_politics", "my_task"]
    assert "\n-      my_task" in dw.describe_datasets(["politics", dw.UserData(str(path))])


def test_a_user_file_named_like_a_dataset_is_rejected(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, ROWS).rename(tmp_path / "wikidata_politics.jsonl")
    with pytest.raises(RequestError, match="rename the file"):
        dw.load_probe_texts(["politics", dw.UserData(str(path))])


def test_without_group_and_span_the_last_word_is_probed_and_groups(tmp_path: Path) -> None:
    path = write_csv(tmp_path, [("I like PARIS  ", "yes"), ("we left Paris", "yes"), ("we left Rome", "no")])
    texts = own(path)
    assert [m.text[m.start : m.end] for m in texts.mentions] == ["PARIS", "Paris", "Rome"]
    assert same(texts.persons) == [0, 0, 2]


@pytest.mark.parametrize("labels", [("0", "1"), ("false", "true"), ("False", "TRUE"), ("0.0", "1"), ("no", "yes")])
def test_two_labels_are_one_probe(tmp_path: Path, labels: tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    texts = own(write_csv(tmp_path, [("a", labels[1]), ("b", labels[0])]))
    assert [probe.name for probe in texts.datasets[0].probes] == ["my_task"]
    assert texts.datasets[0].probes[0].labels.tolist() == [True, False]
    assert ("'yes' counts as 1" in caplog.text) == (labels == ("no", "yes"))


SPELLINGS = [
    1,
    1.0,
    "1",
    "1.0",
    "01",
    "1.5",
    1.5,
    "Zo\u00eb",
    "Zoe\u0308",
    "\uff3aoe\u0308",
    "ZOE\u0308",
    "1e3",
    "1000",
]
PEOPLE = [0, 0, 0, 0, 4, 5, 5, 7, 7, 7, 10, 11, 12]  # the first row of the same person


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_equal_numbers_are_one_group_and_so_are_the_unicode_forms_of_a_name(tmp_path: Path, kind: str) -> None:
    rows = [(f"text {i}", i % 2, group) for i, group in enumerate(SPELLINGS)]
    header = ("text", "label", "group")
    dicts = [dict(zip(header, row, strict=True)) for row in rows]
    path = write_csv(tmp_path, rows, header) if kind == "csv" else write_jsonl(tmp_path, dicts)
    assert same(own(path).persons) == PEOPLE


def test_the_unicode_forms_of_a_probed_name_are_one_person(tmp_path: Path) -> None:
    assert same(own(write_csv(tmp_path, [("Zo\u00eb", 1), ("oh Zoe\u0308", 0), ("Zoe", 0)])).persons) == [0, 0, 2]


def test_three_labels_are_three_probes_on_the_same_rows(tmp_path: Path) -> None:
    texts = own(write_csv(tmp_path, [("a", "red"), ("b", "blue"), ("c", 2)]))
    probes = texts.datasets[0].probes
    assert [probe.name for probe in probes] == ["my_task_is_2", "my_task_is_blue", "my_task_is_red"]
    assert [probe.labels.tolist().index(True) for probe in probes] == [2, 1, 0]


def test_a_task_column_makes_several_probes(tmp_path: Path) -> None:
    rows = [("a", 1, "x"), ("b", 0, "x"), ("a", "p", "y"), ("c", "q", "y")]
    texts = own(write_csv(tmp_path, rows, ("text", "label", "task")))
    assert [(p.name, p.mentions.tolist()) for p in texts.datasets[0].probes] == [("x", [0, 1]), ("y", [0, 2])]


def test_csv_with_byte_order_mark_and_quoted_newlines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes('\ufefftext,label\r\n"one\r\ntwo",1\r\n\r\nthree,\r\n'.encode())
    with pytest.raises(RequestError, match="every label of 't' is '1'"):
        own(path)
    assert "1 of 2 rows have no label and are left out; the first is line 5" in caplog.text
    path.write_bytes('\ufefftext,label\r\n"one\r\ntwo",1\r\n\r\nthree,0\r\n'.encode())
    assert own(path).mentions[0].text == "one\r\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "is empty"),
        ("t.csv", b"text,label\n", "it has no rows"),
        ("t.jsonl", b"\n", "is empty"),
        ("t.csv", b"words,kind\na,1\n", r"missing columns text, label; found words, kind"),
        ("t.csv", b"text,kind\na,1\n", r"missing column label; found text, kind"),
        ("t.csv", b"text,label,start\na,1,0\n", r"missing column end"),
        ("t.csv", b"text,label\na,1\nb,1\n", r"every label of 't' is '1'"),
        ("t.csv", b"text,label\na,1\na,0\nb,1\n", r"'t' has 1 positives in 1 distinct rows"),
        ("t.csv", b"text,label\na,\nb,NA\nc\n", r"no row of 't' has a label"),
        ("t.csv", b"text,label\n  ,1\nb,0\n", r"line 2: text is '  ', but must have words"),
        ("t.jsonl", b'{"text":3,"label":1}', r"line 1: text is 3, but must have words"),
        ("t.jsonl", b'{"text":"a \\ud83d","label":1}', r"line 1: text has an unpaired surrogate"),
        ("t.csv", b"text,label,start,end\nab,1,0,3\n", r"line 2: span 0 to 3 is outside the text's 2 characters"),
        ("t.csv", b"text,label,start,end\nab,1,2,2\n", r"line 2: span 2 to 2 is outside"),
        ("t.csv", b"text,label,start,end\nab,1,-1,1\n", r"line 2: span -1 to 1 is outside"),
        ("t.csv", b"text,label,start,end\na b,1,1,2\n", r"line 2: the span to probe is whitespace"),
        ("t.csv", b"text,label,start,end\nab,1,0,x\n", r"line 2: end is 'x', but must be a whole number"),
        ("t.csv", b"text,label,start,end\nab,1,0,\n", r"line 2: end is None, but must be a whole number"),
        ("t.csv", b"text,label,start,end\nab,1,0,inf\n", r"line 2: end is 'inf', but must be a whole number"),
        ("t.csv", b"text,label\na,1\nb\xff,0\n", r"line 3: not UTF-8 \(byte 0xff\)"),
        ("t.csv", b"text,label\na,1,2\n", r"line 2: more fields than the header names"),
        ("t.csv", b'text,label\n"a"b,1\n', r"line 2: "),
        ("t.csv", b'text,label\na,1\n"b,0\nc,0\n', r"line 3: unexpected end of data"),
        ("t.csv", b"text,label,task\na,1,\n", r"line 2: task is ''"),
        ("t.csv", b"text,label,task\na,x,t\nb,y,t\nc,z,t\na,0,t_is_x\nb,1,t_is_x\n", r"would have the name 't_is_x'"),
        ("t.jsonl", b'{"text":"a","label":1}\n{"text"', r"line 2: not JSON"),
        ("t.jsonl", b"[1]\n", r"row 1: not a JSON object"),
        ("t.txt", b"text\tlabel\n", r"unknown suffix '\.txt': give \.csv, \.tsv, \.json, \.jsonl, \.parquet"),
        ("t.parquet", b"PAR0", r"not a readable Parquet file"),
    ],
)
def test_user_errors_are_one_line_with_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message) as error:
        own(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith((f"`dataset_file` {path}", "t: "))


@pytest.mark.parametrize("labels", [(0.3, 0.7), (0, 0.5, 1), (1.5, "2"), [i / 7 for i in range(200)]])
def test_fractional_labels_are_rejected(tmp_path: Path, labels: Sequence[object]) -> None:
    path = write_csv(tmp_path, [(f"text {i}", label) for i, label in enumerate(labels)])
    with pytest.raises(RequestError, match=r"labels of 'my_task' are fractions, such as .*: probes need classes"):
        own(path)


def test_too_many_distinct_labels_are_reported_as_the_wrong_column(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="200 distinct labels"):
        own(write_csv(tmp_path, [(f"text {i}", f"word {i}") for i in range(200)]))


@pytest.mark.parametrize(
    ("labels", "positive"),
    [
        (("-1", "+1"), "1"),
        (("-1", "1"), "1"),
        ((-1.0, 1.0), "1"),
        (("2", "10"), "10"),
        (("0", "1.0"), "1"),
        (("no", "Yes"), "Yes"),
        (("Male", "female"), "Male"),
        (("B", "a"), "B"),
    ],
)
def test_of_two_labels_the_larger_number_or_the_later_word_is_positive(
    tmp_path: Path, labels: tuple[object, object], positive: str
) -> None:
    probe = own(write_csv(tmp_path, [("a", labels[0]), ("b", labels[1])])).datasets[0].probes[0]
    is_first = positive.casefold() == str(labels[0]).casefold()
    assert (probe.positive, probe.labels.tolist()) == (positive, [is_first, not is_first])


def test_spellings_of_one_label_are_merged_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = ["yes", "Yes", "no", "YES", "yes", "No"]
    (probe,) = own(write_csv(tmp_path, [(f"t{i}", label) for i, label in enumerate(labels)])).datasets[0].probes
    assert (probe.name, probe.positive, probe.labels.tolist()) == (
        "my_task",
        "yes",
        [True, True, False, True, True, False],
    )
    assert "labels 'No' and 'no' are one class" in caplog.text
    assert "labels 'YES' and 'Yes' and 'yes' are one class" in caplog.text


def test_three_classes_in_several_spellings_are_three_probes(tmp_path: Path) -> None:
    labels = ["Zo\u00eb", "Zoe\u0308", "red", "Red", "2", "2.0"]
    probes = own(write_csv(tmp_path, [(f"t{i}", label) for i, label in enumerate(labels)])).datasets[0].probes
    assert [probe.labels.tolist() for probe in probes] == [
        [False, False, False, False, True, True],
        [False, False, True, True, False, False],
        [True, True, False, False, False, False],
    ]


@pytest.mark.parametrize("missing", ["", " ", "nan", "NaN", "NA", "N/A", "<NA>", "null", None, float("nan")])
def test_rows_without_a_label_are_dropped_and_counted(
    tmp_path: Path, missing: object, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": "a", "label": "p"}, {"text": "b", "label": missing}, {"text": "c", "label": "q"}]
    path = tmp_path / "my_task.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    texts = own(path)
    assert [m.text for m in texts.mentions] == ["a", "c"]
    assert [probe.positive for probe in texts.datasets[0].probes] == ["q"]
    assert "1 of 3 rows have no label and are left out; the first is line 2" in caplog.text


def test_labels_that_look_missing_are_classes(tmp_path: Path) -> None:
    texts = own(write_csv(tmp_path, [("a", "none"), ("b", "some"), ("c", "nano")]))
    assert len(texts.datasets[0].probes) == 3


def test_paths_that_are_not_a_dataset_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        own(tmp_path / "absent.csv")
    with pytest.raises(RequestError, match="neither a folder of datasets' save_to_disk"):
        own(tmp_path)
    splits = hf_datasets.DatasetDict({"train": hf_datasets.Dataset.from_list(ROWS)})
    splits.save_to_disk(str(tmp_path / "splits"))
    assert own(tmp_path / "splits").datasets[0].name == "splits"
    assert own(tmp_path / "splits" / "train").datasets[0].name == "train"
