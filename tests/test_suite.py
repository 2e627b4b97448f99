"""The tasks of sae-probes: compared with its own list, then names, groups, and tasks that cannot be measured."""

from __future__ import annotations

import collections
import csv
import io
import logging
import unicodedata
import weakref
from pathlib import Path

import numpy as np
import pytest
import zstandard

from delta_selectivity import tasks as dw
from delta_selectivity.api.arguments import as_tasks
from delta_selectivity.cli.command_line import make_tasks
from delta_selectivity.errors import RequestError
from delta_selectivity.probing.folds import reason_to_skip
from delta_selectivity.system.person_ids import person_ids
from delta_selectivity.tasks import suite_files
from delta_selectivity.tasks.assemble import assemble, distinct_rows
from delta_selectivity.tasks.catalogue import load_task, read_tasks
from delta_selectivity.tasks.data_wheel import open_data, read_labelled
from delta_selectivity.tasks.suite import group_key, load_suite_task
from delta_selectivity.tasks.suite_files import ALL, OUTSIDE_WIKIDATA, SUITE, find_task
from delta_selectivity.tasks.types import Mention, ProbeSpec, Row, RowSet, Task


def master() -> dict[str, str]:
    """Return file -> kind, from the wheel's own table of sources."""
    with open_data("sae_probes/data/probing_datasets_MASTER.csv.zst") as packed:
        text = zstandard.ZstdDecompressor().decompressobj().decompress(packed.read()).decode()
    names = ((row["Dataset save name"], row["Data type"]) for row in csv.DictReader(io.StringIO(text)))
    return {name.removeprefix("cleaned_data/").removesuffix(".csv"): kind for name, kind in names if name}


# --- available tasks


def test_the_suite_has_the_binary_tasks_of_sae_probes():
    kinds = master()
    binary = {stem.replace(" ", "_") for stem, kind in kinds.items() if kind == "Binary Classification"}
    assert set(SUITE) == binary and len(SUITE) == 113
    several = {stem.replace(" ", "_") for stem, kind in kinds.items() if kind == "Multiclass Classification"}
    assert several < set(ALL) - set(SUITE) and len(ALL) == 136
    assert set(suite_files.STEMS.values()) <= set(kinds)


def test_every_task_has_one_family_and_a_way_to_group_its_rows():
    assert {suite_files.family_of(name) for name in ALL} == set(suite_files.FAMILIES)
    assert {suite_files.grouping_of(name) for name in ALL} == set(suite_files.GROUPINGS)


@pytest.mark.slow
def test_the_whole_suite_has_the_rows_that_were_counted_in_the_files():
    rows = distinct = 0
    texts: dict[str, set[tuple[object, ...]]] = collections.defaultdict(set)
    conflicting = []
    for task in read_tasks(SUITE):
        (row_set,) = task.row_sets
        values = collections.defaultdict(set)
        for row in row_set.rows:
            values[row.mention.text].add(row.value)
            texts[row.mention.text].add((*row.mention.identity, row.mention.person))
            assert row.mention.end == len(row.mention.text)
        rows, distinct = rows + len(row_set.rows), distinct + len(values)
        conflicting += [task.name] if any(len(found) > 1 for found in values.values()) else []
        assert len(row_set.probes) == 1
    assert (rows, distinct, len(conflicting), len(texts)) == (334_092, 276_416, 16, 222_062)
    assert sum(map(len, texts.values())) == len(texts) + 1  # one forward pass each, except for one in two groups


# --- names


@pytest.mark.parametrize("spelling", ["117", "us_state_FL", "US_STATE_fl", "117_us_state_FL"])
def test_a_task_is_named_by_number_or_name(spelling: str):
    assert dw.parse_dataset_names(spelling) == ("117_us_state_FL",)


@pytest.mark.parametrize("spelling", ["131", "temp_cat_Typical Time", "131_temp_cat_typical_time"])
def test_names_with_spaces_are_written_with_underscores(spelling: str):
    assert dw.parse_dataset_names(spelling) == ("131_temp_cat_Typical_Time",)


def test_the_wikidata_tasks_keep_their_numbers_and_are_the_default():
    assert dw.parse_dataset_names("0,1,2,3,4") == dw.parse_dataset_names("wikidata") == dw.DATASET_NAMES
    assert make_tasks({}) == dw.DATASET_NAMES


def test_group_names_select_several_tasks():
    assert dw.parse_dataset_names("gender, sae-probes, 5") == ("gender", *SUITE)
    assert dw.parse_dataset_names("all") == (*dw.DATASET_NAMES, *OUTSIDE_WIKIDATA)
    assert as_tasks("sae-probes") == SUITE
    assert as_tasks(["wikidata", "glue_cola", "gender"]) == (*dw.DATASET_NAMES, "87_glue_cola")
    assert as_tasks("wikidata,117_us_state_FL")[-1] == "117_us_state_FL"


def test_all_asks_each_question_once():
    """No file has the rows of another, or those of one class of another, or those of a Wikidata task."""
    named = set(OUTSIDE_WIKIDATA)
    assert not named & {"56_wikidatasex_or_gender", "108_athlete_sport", "154_athlete_sport_football"}
    assert "13_us_state" in named and not {"117_us_state_FL", "118_us_state_CA", "119_us_state_TX"} & named
    for one, same in (("37_arith_mc", "38_arith_difficulty"), ("111_yelp_data", "112_amzn_rev")):
        assert one in named and same not in named
        assert list(read_labelled(one)) == list(read_labelled(same))
    whole = {text for text, _ in read_labelled("27_art_type")}
    part = {text for text, _ in read_labelled("126_art_type_book")}
    assert part < whole


@pytest.mark.parametrize("name", ["2_hist_fig_birthyear", "nyc_lat", "109"])
def test_regression_tasks_are_rejected(name: str):
    with pytest.raises(RequestError, match=r"`tasks` \d+_\w+: its labels are numbers, not classes"):
        load_suite_task(*dw.parse_dataset_names(name))


def test_unknown_tasks_are_rejected_with_suggestions():
    with pytest.raises(RequestError, match="did you mean 117_us_state_FL"):
        dw.parse_dataset_names("us_state_F")
    with pytest.raises(RequestError, match="sae-probes is a group of 113 tasks: give one task"):
        load_task("sae-probes")
    with pytest.raises(RequestError, match="Wikidata tasks only"):
        make_tasks({"datasets": "glue_cola", "data_dir": "theirs"})


def test_a_users_file_takes_precedence_over_an_unnumbered_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dw.name_task("living-room") == "66_living-room"
    (tmp_path / "living-room").mkdir()
    assert dw.name_task("living-room") == dw.UserData("living-room")
    assert dw.name_task("66_living-room") == "66_living-room"


# --- texts, classes and groups


def test_the_positive_class_is_the_label_encoders():
    from sklearn.preprocessing import LabelEncoder

    for name in ("56_wikidatasex_or_gender", "65_high-school", "87_glue_cola", "58_wikidatapolitical_party"):
        pairs = list(read_labelled(suite_files.STEMS[name]))
        encoder = LabelEncoder().fit([label for _, label in pairs])
        ((probe,),) = (row_set.probes for row_set in load_suite_task(name).row_sets)
        assert probe.positive == encoder.classes_[1]
        assert probe.name == name.partition("_")[2]


def test_each_of_several_classes_is_a_probe_against_the_rest():
    texts = dw.load_probe_texts(["101_disease_class"])
    (dataset,) = texts.datasets
    assert len(dataset.probes) == 5 and dataset.probes[0].name == "disease_class_is_cardiovascular_diseases"
    assert all(np.array_equal(probe.mentions, dataset.probes[0].mentions) for probe in dataset.probes)
    assert np.array_equal(np.sum([probe.labels for probe in dataset.probes], axis=0), np.ones(1918 - 83))
    assert (dataset.family, dataset.slug, dataset.is_public) == ("topics", "101_disease_class", True)


def test_texts_with_two_labels_are_dropped_from_both_classes(caplog):
    (row_set,) = distinct_rows(load_suite_task("145_disease_class_digestive_system_diseases")).row_sets
    assert len(row_set.rows) == 909 - 19
    assert "dropped 19 texts with two labels" in caplog.text


def test_the_last_character_is_probed_even_if_it_is_a_space():
    (row_set,) = load_suite_task("92_glue_sst2").row_sets
    mention = row_set.rows[0].mention
    assert mention.text.endswith(" ") and mention.end == len(mention.text)


@pytest.mark.parametrize(
    ("name", "same", "other"),
    [
        ("56", ("as told by Barack Obama", "says BARACK OBAMA"), "by Michelle Obama"),
        ("5", ("Blanche of France, Duchess of Orléans", "Blanche of France (nun)"), "Blanche of Castile"),
        ("13", ("Salem, New York", "Salem (Oregon)", "SALEM"), "New Salem"),
        ("27", ("(A Romance in Lower Mathematics)", "A romance in lower mathematics"), "Goliath"),
        ("36", ("Q: What is it?\nA: a", "Q: What is it?\nA: b"), "Q: What was it?\nA: a"),
        ("55", ("What needs energy? (A) a car (B) wood", "What needs energy? (A) rubber (B) wood"), "What is it?"),
        ("52", ("He lied. [SEP] honest", "He lied. [SEP] kind"), "She lied. [SEP] kind"),
        ("88", ("It rains. | It is wet.", "It rains. | It is dry."), "It is wet. | It rains."),
        ("21", ("House Signals Break.", "House signals break"), "House Signals Brake."),
        ("92", ("so smart", "so smart . "), "so dull"),
    ],
)
def test_rows_about_one_entity_are_one_group(name: str, same: tuple[str, ...], other: str):
    grouping = suite_files.grouping_of(str(find_task(name)))
    keys = {group_key(text, grouping) for text in same}
    assert len(keys) == 1
    assert keys != {group_key(other, grouping)}


def test_keys_of_long_texts_are_short_and_distinct():
    one, other = ("word " * 2000 + end for end in ("a", "b"))
    assert group_key(one, "text") != group_key(other, "text")
    assert len(group_key(one, "text")) <= 80
    assert group_key("$$$", "text") != group_key("??", "text")


def test_one_text_in_two_groups_is_two_mentions(tmp_path):
    """A task's numbers do not depend on other tasks of the request."""
    text = "Margaret of Hungary"
    alone, both = (dw.load_probe_texts(names) for names in (["5"], ["56_wikidatasex_or_gender", "5"]))
    found = [
        {texts.mentions[m].person for m in texts.datasets[-1].probes[0].mentions if texts.mentions[m].text == text}
        for texts in (alone, both)
    ]
    assert found[0] == found[1]
    fingerprints = {dw.dataset_fingerprint(texts, texts.datasets[-1]) for texts in (alone, both)}
    assert len(fingerprints) == 1


# --- tasks that cannot be measured


def toy(name: str, values: str) -> Task:
    rows = tuple(Row(Mention(f"{name} {i}", 0, 3, f"{name} {i}"), value) for i, value in enumerate(values))
    return Task(name, name, (RowSet(rows, (ProbeSpec(name, "1"),)),))


def test_one_of_several_tasks_without_two_classes_gives_a_reason():
    sources = [toy("good", "01" * 20), toy("flat", "0" * 20)]
    texts = assemble(sources, None, 0, several=True)
    good, flat = (dataset.probes[0] for dataset in texts.datasets)
    assert reason_to_skip(good.labels, texts.persons[good.mentions], 5) is None
    found = reason_to_skip(flat.labels, texts.persons[flat.mentions], 5)
    assert found is not None and found.reason == "the positive class has 0 groups, fewer than the 5 folds"
    with pytest.raises(RequestError, match="0 positives in 20 distinct rows"):
        assemble(sources[1:], None, 0)


def test_a_draw_too_small_for_the_classes_of_one_task_leaves_the_others(caplog):
    caplog.set_level(logging.ERROR)
    with pytest.raises(RequestError, match="at least 11 rows"):
        dw.load_probe_texts(["25_headline_year"], shuffle_select_n=10)
    texts = dw.load_probe_texts(["25_headline_year", "24_headline_isiran"], shuffle_select_n=10)
    assert [len(dataset.probes[0].labels) for dataset in texts.datasets] == [10, 10]


def test_people_are_shared_across_tasks():
    assert len(set(person_ids([group_key("Ada Lovelace", "person"), group_key("Ada Lovelace", "name")]).tolist())) == 1


@pytest.mark.parametrize("ending", ["", " ", "  ", "\n", " \n\n", "\t", "\u00a0", ' . "'])
def test_the_last_token_is_always_probed(ending: str):
    from transformers import AutoTokenizer

    from delta_selectivity.cli.command_line import DEMO_MODEL
    from delta_selectivity.tasks.suite import _mention

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    text = f"it looks like a face{ending}"
    found = dw.tokenise([_mention(text, "text")], tokenizer, prepend_bos=False, max_length=128)
    assert found.ids[0].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found.last[0] == len(found.ids[0]) - 1 and found.first[0] <= found.last[0]


def test_texts_that_are_too_long_keep_their_end(caplog):
    from transformers import AutoTokenizer

    from delta_selectivity.cli.command_line import DEMO_MODEL
    from delta_selectivity.tasks.suite import _mention

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    text = "one two three " * 500 + "the end "
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = dw.tokenise([_mention(text, "text")], tokenizer, prepend_bos=False, max_length=64)
    assert found.ids[0].tolist() == whole[-64:] and found.last[0] == 63
    assert "1 of 1 texts are longer than the model's 64 tokens" in caplog.text


def test_baselines_of_a_suite_are_fitted_to_texts_of_its_tasks():
    found = dw.load_all_mentions(("117_us_state_FL", "118_us_state_CA"))
    texts = {text for number in ("117_us_state_FL", "118_us_state_CA") for text, _ in read_labelled(number)}
    assert {mention.text for mention in found} == texts and len(found) == len(texts)


@pytest.mark.parametrize(
    "text", ["It's “so” fine_ly: 1.5 %", "It's so fine_ly: 1.5 %\x1c\x7f", "Café — naïve", "x\u200by"]
)
def test_keys_have_only_letters_and_digits(text: str):
    kept = unicodedata.normalize("NFKD", text.casefold())
    expected = " ".join("".join(c for c in kept if c.isalnum() or c.isspace()).split())
    assert group_key(text, "text") == expected


def test_tasks_are_read_one_after_another():
    """A suite as shipped is larger than what is drawn from it, so at most two tasks are in memory."""
    read = []

    def tasks():
        for i in range(5):
            task = toy(f"task {i}", "01" * 20)
            read.append(weakref.ref(task))
            assert sum(one() is not None for one in read) <= 2
            yield task
            del task

    texts = assemble(tasks(), 10, 0, several=True)
    assert [len(dataset.probes[0].labels) for dataset in texts.datasets] == [10] * 5
    assert len(texts.mentions) == 50


def test_sums_of_a_block_are_freed_after_probing(tiny_model, tiny_saes, tmp_path, monkeypatch):
    """Sums have a number for each latent: for a suite with hundreds of blocks they would need gigabytes."""
    from runs import Request

    from delta_selectivity.run import measure

    probers, most = [], []

    class Recorded(measure.Prober):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            probers.append(self)

        def _probe_dataset(self, *args):
            most.append(len(self._done))
            super()._probe_dataset(*args)

    monkeypatch.setattr(measure, "Prober", Recorded)
    flags = (
        "--datasets",
        "117,118,119,141",
        "--shuffle_select_n",
        "60",
        "--layers",
        "1",
        "--folds",
        "3",
        "--repeats",
        "1",
    )
    assert Request(tiny_model, (tiny_saes,), Path(), tmp_path, flags).run() == 0
    (prober,) = probers
    assert not prober._done and max(most) < len(prober.blocks)
