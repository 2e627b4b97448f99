"""Labels without meaning: the effect of duplicates and of people on both sides of a split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import bundled
from benchmarks.leakage import MODELS, Rows, compare, compare_saes, measure_suite, read_pairs
from delta_selectivity.errors import RequestError
from delta_selectivity.models.language_model import Site, open_model
from delta_selectivity.probing.probes import choose_backend
from delta_selectivity.tasks import Mention, load_task

N_PEOPLE, MENTIONS, COPIES, D = 80, 4, 2, 64


@pytest.fixture(scope="module")
def found():
    """Return random labels of people, activations that identify the person, and every row twice."""
    random = np.random.default_rng(0)
    persons = np.repeat(np.arange(N_PEOPLE), MENTIONS)
    labels = (random.permutation(N_PEOPLE) % 2 == 0)[persons]
    x = random.normal(size=(N_PEOPLE, D))[persons] + random.normal(size=(len(persons), D))
    distinct = Rows(torch.from_numpy(x).float(), labels[None], persons)
    shipped = Rows(distinct.x.repeat(COPIES, 1), np.tile(labels, (1, COPIES)), np.tile(persons, COPIES))
    backend, _ = choose_backend("torch", "cpu")
    (leakage,) = compare(["coin"], shipped, distinct, backend)
    return leakage


def test_random_labels_are_memorised_through_duplicates(found):
    assert found.by_person.value == pytest.approx(0.5, abs=0.1)
    assert found.distinct.value > found.by_person.value + 0.1
    assert found.shipped.value > found.distinct.value + 0.03


def test_the_effect_of_people_is_the_difference_of_the_splits(found):
    assert found.persons_share.value == pytest.approx(found.distinct.value - found.by_person.value)
    assert 0 < found.persons_share.low < found.persons_share.value < found.persons_share.high


def test_rows_and_people_are_counted(found):
    assert (found.n_shipped, found.n_distinct, found.n_people) == (640, 320, 80)


def test_the_standard_error_by_row_is_too_small(found):
    """Rows of a person are right or wrong together."""
    assert found.row_standard_error < 0.9 * found.person_standard_error


TEXTS = (
    "The prize went to Marie Curie",
    "We met Otto Hahn",
    "In the year 1950 it was the turn of one Bertrand Russell",
)


def test_bundled_activations_are_those_of_the_last_token_of_each_name():
    found = bundled.activations([Mention(text, text.rindex(" ") + 1, len(text), "") for text in TEXTS], [1, 3])
    assert {layer: tuple(x.shape) for layer, x in found.items()} == {1: (3, 256), 3: (3, 256)}
    info = open_model(str(bundled.MODEL))
    site = Site(3, "resid_post")
    model = info.load([site], "cpu", info.choose_dtype("auto", "cpu"))
    for row, text in zip(found[3], TEXTS, strict=True):
        ids = [info.tokenizer.bos_token_id, *info.tokenizer(text, add_special_tokens=False)["input_ids"]]
        alone = model.activations(torch.tensor([ids]))[site][0, -1].float()
        assert torch.cosine_similarity(row, alone, dim=0) > 0.999


def test_a_missing_layer_is_rejected():
    with pytest.raises(RequestError, match="layers 0 to 5"):
        bundled.activations([Mention("Otto Hahn", 0, 9, "")], [6])


def test_whole_groups_of_a_task_are_drawn_with_all_copies_of_their_texts():
    (pair,) = read_pairs(["42_temp_sense"], 60)
    every = {row.mention for row in load_task("42_temp_sense").row_sets[0].rows}
    drawn = {row.mention for row in pair.distinct.rows}
    groups = {mention.person for mention in drawn}
    assert 60 <= len(drawn) < 100 and drawn == {mention for mention in every if mention.person in groups}
    assert {row.mention for row in pair.shipped.rows} == drawn
    assert len(pair.shipped.rows) > len(drawn)


def test_two_saes_are_compared_as_published_and_by_group():
    random = np.random.default_rng(1)
    persons = np.repeat(np.arange(60), 3)
    labels = (np.arange(60) % 2 == 0)[persons]
    told = torch.from_numpy(np.where(labels, 1.0, -1.0)[:, None] + random.normal(size=(180, 4))).float()
    noise = torch.from_numpy(random.normal(size=(180, 4))).float()
    worse, better = (Rows(x, labels[None], persons) for x in (noise, told))
    backend, _ = choose_backend("torch", "cpu")
    found = compare_saes([worse, worse], [better, better], backend)
    assert found.as_published.low > 0 and found.by_group.low > 0
    assert compare_saes([worse, worse], [worse, worse], backend).by_group.value == 0


def test_texts_beyond_the_limit_keep_their_end():
    end = f" {TEXTS[0]}"
    mentions = [Mention(start + end, len(start), len(start + end), "") for start in ("", "He lives near Kiel. We met")]
    n_tokens = len(open_model(str(bundled.MODEL)).tokenizer(end)["input_ids"]) + 1
    cut, whole = bundled.activations(mentions, [3], max_length=n_tokens)[3]
    assert torch.cosine_similarity(cut, whole, dim=0) > 0.999
    assert torch.cosine_similarity(*bundled.activations(mentions, [3])[3], dim=0) < 0.999


@pytest.mark.slow
def test_the_suite_is_measured_on_the_bundled_model():
    measured = replace(MODELS["tiny-pythia"], tasks=["42_temp_sense", "117_us_state_FL"])
    lines = measure_suite(measured, 4, n_texts=80)
    assert [line["task"] for line in lines] == list(measured.tasks)
    assert all(line["n_distinct"] >= 80 and "as_published" in line for line in lines)
