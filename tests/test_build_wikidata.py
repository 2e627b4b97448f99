"""From a dump in Wikidata's format and a folder of texts to a file for `--dataset_file`, and to a run on it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from conftest import FRAMES, MEN, SURNAMES, WOMEN
from runs import Request, files, numbers

from delta_selectivity import tasks as dw
from scripts import build_wikidata
from scripts.wikidata_build import classes as c
from scripts.wikidata_build import dump, entities, output, selection
from scripts.wikidata_build.mentions import MentionFinder
from scripts.wikidata_build.people import Names, PeopleTable

ROOT = Path(__file__).resolve().parent.parent

FEMALE, MALE, HUMAN, JOURNALIST, ACTOR, SINGER = 6581072, 6581097, 5, 1930187, 33999, 177220
FOOTBALLER, BASKETBALLER, DEMOCRATS, REPUBLICANS = 937857, 3665646, 29552, 29468
SWIMMER, SPRINTER, RUNNER, PAINTER = 10843402, 4009406, 12803959, 1028181

# --- the format of https://www.wikidata.org/wiki/Special:EntityData/Q42.json and of the dumps

_ids = count(1)


def snak(prop: str, value: Any) -> dict[str, Any]:
    """Return a snak; value: the number of an item, a time, 'somevalue' or 'novalue'."""
    if value in ("somevalue", "novalue"):
        return {"snaktype": value, "property": prop, "hash": "f" * 40,
                "datatype": "time" if prop in ("P569", "P570") else "wikibase-item"}  # fmt: skip
    if isinstance(value, int):
        kind, datatype = "wikibase-entityid", "wikibase-item"
        inner: Any = {"entity-type": "item", "numeric-id": value, "id": f"Q{value}"}
    else:
        kind = datatype = "time"
        inner = {"time": value, "timezone": 0, "before": 0, "after": 0, "precision": 9 if "-00-00T" in value else 11,
                 "calendarmodel": "http://www.wikidata.org/entity/Q1985727"}  # fmt: skip
    return {"snaktype": "value", "property": prop, "hash": "e" * 40, "datavalue": {"value": inner, "type": kind},
            "datatype": datatype}  # fmt: skip


def statement(prop: str, value: Any, rank: str = "normal") -> dict[str, Any]:
    """Return a statement with a qualifier and a reference, whose values do not belong to the statement."""
    return {
        "mainsnak": snak(prop, value), "type": "statement",
        "qualifiers": {"P580": [snak("P580", "+1999-00-00T00:00:00Z")], "P106": [snak("P106", SINGER)]},
        "qualifiers-order": ["P580", "P106"], "id": f"Q1${next(_ids):036d}", "rank": rank,
        "references": [{"hash": "a" * 40, "snaks": {"P248": [snak("P248", 36578)]}, "snaks-order": ["P248"]}],
    }  # fmt: skip


def entity(number: int, label: str | None, claims: dict[str, list[Any]], language: str = "en") -> dict[str, Any]:
    """Return an entity. claims: property -> values, or (value, rank)."""
    ranked = {p: [v if isinstance(v, tuple) else (v, "normal") for v in values] for p, values in claims.items()}
    return {
        "type": "item", "id": f"Q{number}",
        "labels": {language: {"language": language, "value": label}} if label is not None else [],
        "descriptions": {"en": {"language": "en", "value": "somebody"}},
        "aliases": {"en": [{"language": "en", "value": "Nobody Nowhere"}]},
        "claims": {p: [statement(p, *value) for value in values] for p, values in ranked.items()} or [],
        "sitelinks": {"enwiki": {"site": "enwiki", "title": str(label), "badges": []}},
        "pageid": number, "ns": 0, "title": f"Q{number}", "lastrevid": 1, "modified": "2024-01-01T00:00:00Z",
    }  # fmt: skip


def human(label: str | None, language: str = "en", **claims: list[Any]) -> dict[str, Any]:
    return entity(next(_ids) + 10**6, label, {"P31": [HUMAN], **claims}, language)


def dump_bytes(lines: list[Any]) -> bytes:
    """Return `[`, an entity per line with a comma after all but the last, `]`; a string is used as a line unchanged."""
    told = [line if isinstance(line, str) else json.dumps(line, separators=(",", ":")) for line in lines]
    return ("[\n" + ",\n".join(told) + "\n]\n").encode()


BIRTH, DEATH = "+1950-03-11T00:00:00Z", "+1975-00-00T00:00:00Z"
CLASSES_OF_ITEMS = [
    entity(SWIMMER, "swimmer", {"P279": [c.ATHLETE]}),
    entity(RUNNER, "runner", {"P279": [c.ATHLETE, PAINTER]}),
    entity(SPRINTER, "sprinter", {"P279": [RUNNER]}),
    entity(PAINTER, "painter", {"P279": [(c.ATHLETE, "deprecated"), 483501]}),
    entity(42, "a book", {"P31": [571]}),
    {"type": "property", "id": "P31", "datatype": "wikibase-item", "labels": [], "claims": []},
]


def crowd(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return n people with names like those of the tiny model's tokenizer, and a class of every task."""
    rng = random.Random(seed)
    names = sorted({f"{first} {last}" for first in WOMEN + MEN for last in SURNAMES if len(f"{first} {last}") >= 8})
    made = []
    for i, name in enumerate(rng.sample(names, n)):
        job = [JOURNALIST, ACTOR, SINGER, c.POLITICIAN, FOOTBALLER, BASKETBALLER][i % 6]
        claims = {"P21": [FEMALE if name.split()[0] in WOMEN else MALE], "P106": [job], "P569": [BIRTH]}
        claims |= {"P102": [(DEMOCRATS, REPUBLICANS)[i // 6 % 2]]} if job == c.POLITICIAN else {}
        claims |= {"P570": [DEATH]} if i % 2 else {}
        made.append(human(name, **claims))
    return made


def name_of(person: dict[str, Any]) -> str:
    return str(person["labels"]["en"]["value"])


@pytest.fixture(scope="module")
def people() -> list[dict[str, Any]]:
    return crowd(150)


@pytest.fixture
def texts(tmp_path: Path, people: list[dict[str, Any]]) -> Path:
    """Mention each person in two texts, with the name within the text and not at its end."""
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = random.Random(1)
    lines = [f"{rng.choice(FRAMES).format(name_of(p))} and went home." for p in people for _ in range(2)]
    (folder / "all.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def build(tmp_path: Path, texts: Path) -> Callable[..., int]:
    """Build from these lines, write people.jsonl, and return the exit code."""

    def call(lines: list[Any], *flags: str, out: str = "people.jsonl") -> int:
        (tmp_path / "dump.json").write_bytes(dump_bytes(lines))
        return build_wikidata.main(
            [
                str(tmp_path / "dump.json"),
                str(texts),
                "-o",
                str(tmp_path / out),
                "--quiet",
                "--min_per_class",
                "10",
                *flags,
            ]
        )

    return call


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def person_of(**claims: list[Any]) -> entities.Person:
    found = entities.person_of(human("Ada Lovelace", **claims))
    assert found is not None
    return found


# --- entities


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ([FEMALE], 1),
        ([MALE], 2),
        ([], c.NONE),
        ([1052281], c.NONE),
        ([FEMALE, 1052281], 1),
        ([FEMALE, MALE], c.SEVERAL),
        ([FEMALE, FEMALE], 1),
        ([(FEMALE, "deprecated"), MALE], 2),
        ([(FEMALE, "deprecated")], c.NONE),
        ([(FEMALE, "preferred"), MALE], 1),
        (["somevalue"], c.NONE),
        (["novalue", MALE], 2),
        ([("novalue", "preferred"), MALE], c.NONE),
    ],
)
def test_only_statements_of_the_best_rank_count(values: list[Any], code: int) -> None:
    assert person_of(P21=values).gender == code


@pytest.mark.parametrize(
    ("born", "died", "code"),
    [
        ([BIRTH], [], 1),
        ([], [], c.NONE),
        (["somevalue"], [], c.NONE),
        ([BIRTH], ["novalue"], 1),
        ([BIRTH], ["somevalue"], c.NONE),  # dead, but nobody knows since when
        ([BIRTH], [DEATH], 2),
        ([], [DEATH], 2),
        ([BIRTH], ["+1980-12-31T00:00:00Z"], 2),
        ([BIRTH], ["+1981-01-01T00:00:00Z"], c.NONE),
        ([BIRTH], [("+2001-01-01T00:00:00Z", "deprecated")], 1),
        ([BIRTH], [DEATH, "+2001-01-01T00:00:00Z"], c.NONE),
        ([BIRTH], ["-0044-03-15T00:00:00Z"], 2),
        (["+1750-00-00T00:00:00Z"], [], c.NONE),  # died long ago, whatever is missing
        (["+1910-00-00T00:00:00Z"], [], 1),
    ],
)
def test_is_alive_from_birth_and_death(born: list[Any], died: list[Any], code: int) -> None:
    assert person_of(P569=born, P570=died).is_alive == code


def test_a_century_does_not_count_as_a_year() -> None:
    person = human("Ada Lovelace", P569=["+2000-00-00T00:00:00Z"])
    person["claims"]["P569"][0]["mainsnak"]["datavalue"]["value"]["precision"] = 7
    found = entities.person_of(person)
    assert found is not None and found.is_alive == c.NONE


def test_parties_count_only_for_politicians() -> None:
    assert person_of(P102=[DEMOCRATS], P106=[c.POLITICIAN, ACTOR]).politics == 1
    assert person_of(P102=[REPUBLICANS, 7320], P106=[c.POLITICIAN]).politics == 2
    assert person_of(P102=[DEMOCRATS, REPUBLICANS], P106=[c.POLITICIAN]).politics == c.SEVERAL
    assert person_of(P102=[DEMOCRATS], P106=[ACTOR]).politics == c.NONE


def test_qualifiers_and_references_do_not_count_as_values() -> None:
    assert person_of(P21=[FEMALE], P106=[ACTOR]).occupations == (ACTOR,)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("Ada Lovelace", "Ada Lovelace"),
        ("  Ada   Lovelace ", "Ada Lovelace"),
        ("Martin Luther King Jr.", "Martin Luther King Jr"),
        ("J. K. Rowling", "J. K. Rowling"),
        ("Shaquille O'Neal", "Shaquille O'Neal"),
        ("José Saramago", "José Saramago"),
        ("Voltaire the", "Voltaire the"),
        ("Ed Wood", None),  # fewer than eight characters
        ("Montesquieu", None),
        ("John Smith (actor)", None),  # no text spells it like this
        ("a b c d e f g h i", None),
        (None, None),
    ],
)
def test_names_that_can_be_found(label: str | None, name: str | None) -> None:
    found = entities.person_of(human(label))
    assert (found.name if found else None) == name


def test_the_label_of_all_languages_replaces_a_missing_english_one() -> None:
    found = entities.person_of(human("Ada Lovelace", "mul"))
    assert found is not None and found.name == "Ada Lovelace"
    assert entities.person_of(human("Ada Lovelace", "de")) is None


def test_entities_that_are_not_human_are_skipped() -> None:
    assert entities.person_of(entity(1, "Sherlock Holmes", {"P31": [95074], "P21": [MALE]})) is None
    assert entities.person_of(entity(1, "Sherlock Holmes", {"P31": [(HUMAN, "deprecated"), 95074]})) is None
    assert entities.person_of(entity(1, "Sherlock Holmes", {})) is None


# --- the table of people


def table_of(*persons: dict[str, Any]) -> Names:
    table = PeopleTable()
    for line in [*CLASSES_OF_ITEMS, *persons]:
        person = entities.person_of(line)
        if person is not None:
            table.add(person)
        if parents := entities.items_of(line, "P279"):
            table.add_subclass(entities.item_number(line), parents)
    return table.names()


def code_of(names: Names, name: str, task: c.Task) -> int:
    (row,) = np.flatnonzero(names.hashes == hash(name))
    return int(names.codes[task.name][row])


@pytest.mark.parametrize(
    ("occupations", "occupation", "sport"),
    [
        ([ACTOR], "actor", None),
        ([ACTOR, PAINTER], "actor", None),
        ([ACTOR, SINGER], None, None),
        ([SWIMMER], "athlete", None),
        ([SPRINTER, SWIMMER], "athlete", None),  # both are subclasses of athlete, one of them indirectly
        ([FOOTBALLER, BASKETBALLER], "athlete", None),
        ([FOOTBALLER, SPRINTER], "athlete", "soccer"),
        ([BASKETBALLER, ACTOR], None, "basketball"),
        ([PAINTER], None, None),  # a subclass of athlete only by a deprecated statement
        ([], None, None),
    ],
)
def test_occupations_include_subclasses_of_athlete(
    occupations: list[int], occupation: str | None, sport: str | None
) -> None:
    names = table_of(human("Ada Lovelace", P106=occupations, P21=[FEMALE]))
    for task, expected in ((c.OCCUPATIONS, occupation), (c.SPORTS, sport)):
        code = code_of(names, "Ada Lovelace", task)
        assert (task.classes[code - 1] if code else None) == expected


def test_people_with_one_name_and_different_classes_do_not_count() -> None:
    names = table_of(
        human("John Kennedy", P21=[MALE], P106=[ACTOR], P569=[BIRTH]),
        human("John Kennedy", P21=[MALE], P106=[SINGER]),
        human("John Kennedy", P570=[DEATH], P102=[1], P27=[30], P19=[60]),
        human("Mary Johnson", P21=[FEMALE], P106=[ACTOR, SINGER]),
        human("Mary Johnson", P106=[ACTOR]),
    )
    assert len(names.hashes) == 2
    assert code_of(names, "John Kennedy", c.GENDER) == 2
    assert code_of(names, "John Kennedy", c.OCCUPATIONS) == c.NONE
    assert code_of(names, "John Kennedy", c.IS_ALIVE) == c.NONE
    assert code_of(names, "Mary Johnson", c.OCCUPATIONS) == c.NONE  # one of them has two occupations
    (row,) = np.flatnonzero(names.hashes == hash("John Kennedy"))
    assert names.prominence[row] == 5  # properties of the third person: P31 and four others


def test_people_without_any_class_are_not_stored() -> None:
    names = table_of(human("Ada Lovelace", P106=[PAINTER]), human("Ada Byron", P21=[FEMALE]))
    assert names.hashes.tolist() == [hash("Ada Byron")]
    assert names.prefixes.tolist() == [hash("Ada Byron")]


# --- mentions


def finder_of(*names: str, context: int = 600, per_name: int = 9, seed: int = 0) -> MentionFinder:
    return MentionFinder(table_of(*(human(name, P21=[FEMALE]) for name in names)), context, per_name, seed)


def names_found(finder: MentionFinder) -> Counter[str]:
    return Counter(context.name for found in finder.found.values() for context in found.contexts)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("we met Ada Lovelace, and", ["Ada Lovelace"]),
        ("Ada Lovelace's sister Ada Lovelacer", ["Ada Lovelace"]),
        ("we met Ada\nLovelace", ["Ada Lovelace"]),
        ("we met Ada\n\nLovelace; Ada, Lovelace; ada lovelace; Ada  Lovelace", []),
        ("McAda Lovelace and Mary-Ada Lovelace and Ada Lovelace-King", []),
        ("x-Ada Lovelace - Ada Lovelace-", ["Ada Lovelace"]),
        ("(Ada Lovelace King)", ["Ada Lovelace King"]),
        ("Ada Lovelace Ada Lovelace King", ["Ada Lovelace", "Ada Lovelace King"]),
        ("Ada Ada Lovelace", ["Ada Lovelace"]),
        ("J. K. Rowling. José Saramago! Shaquille O'Neal's", ["J. K. Rowling", "José Saramago", "Shaquille O'Neal"]),
        ("Ada \ufffdda Lovelace. \ufffd Ada Lovelace", []),  # invalid UTF-8 is not part of a context
        ("", []),
        ("Ada", []),
    ],
)
def test_whole_names_are_found(text: str, found: list[str]) -> None:
    finder = finder_of("Ada Lovelace", "Ada Lovelace King", "J. K. Rowling", "José Saramago", "Shaquille O'Neal")
    finder.search(text)
    assert sorted(names_found(finder)) == sorted(found)


def test_mentions_equal_those_of_a_brute_force_search() -> None:
    rng = random.Random(0)
    syllables = ["Anna", "Berta", "Clara", "O'Neal", "de", "Jean-Paul", "K.", "Ruth"]
    names = sorted({" ".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(60)})
    known = {p.name for name in names if (p := entities.person_of(human(name))) is not None}
    finder = finder_of(*names, context=10**6, per_name=10**6)
    longest_first = "|".join(map(re.escape, sorted(known, key=lambda name: (-len(name), name))))
    naive = re.compile(rf"(?<![\w])(?<!\w-)(?:{longest_first})(?!\w)(?!-\w)")
    expected: Counter[str] = Counter()
    for i in range(300):
        text = f"{i}: " + "".join(
            rng.choice(syllables) + rng.choice([" ", " ", " ", ", ", "\n", "-"]) for _ in range(40)
        )
        finder.search(text)
        expected.update(match[0] for match in naive.finditer(text.replace("\n", " ")))
    assert sum(expected.values()) > 500
    assert names_found(finder) == expected


@pytest.mark.parametrize(
    ("room", "before"),
    [(600, "In the beginning nobody had ever met "), (12, "ever met "), (9, "ever met "), (8, "met "), (1, "")],
)
def test_a_context_ends_with_the_name_and_begins_with_a_word(room: int, before: str) -> None:
    finder = finder_of("Ada Lovelace", context=room)
    finder.search("In the beginning nobody had ever met Ada Lovelace, but then")
    ((context,),) = (found.contexts for found in finder.found.values())
    assert context.text == before + "Ada Lovelace"
    assert context.text[context.start :] == "Ada Lovelace"


def test_mentions_are_sampled_uniformly() -> None:
    drawn: Counter[str] = Counter()
    for seed in range(400):
        finder = finder_of("Ada Lovelace", per_name=2, seed=seed)
        for i in range(8):
            finder.search(f"{i} Ada Lovelace")
        (found,) = finder.found.values()
        assert (found.seen, len(found.contexts)) == (8, 2)
        drawn.update(context.text[0] for context in found.contexts)
    assert all(70 < drawn[str(i)] < 130 for i in range(8)), drawn  # 100 expected, standard deviation 9


def test_repeated_texts_count_once() -> None:
    finder = finder_of("Ada Lovelace")
    for _ in range(3):
        finder.search("we met Ada Lovelace")
    (found,) = finder.found.values()
    assert (found.seen, len(found.contexts)) == (1, 1)


# --- the program


def test_a_build_is_what_the_dump_says(build: Callable[..., int], people: list[dict[str, Any]], tmp_path: Path) -> None:
    assert build([*CLASSES_OF_ITEMS, *people], "--per_name", "2") == 0
    rows = rows_of(tmp_path / "people.jsonl")
    by_name = {name_of(person): person["claims"] for person in people}

    def items(name: str, prop: str) -> set[int]:
        return {s["mainsnak"]["datavalue"]["value"]["numeric-id"] for s in by_name[name].get(prop, ())}

    for row in rows:
        name = row["group"]
        assert row["text"].endswith(name)
        assert (row["text"][row["start"] : row["end"]], row["end"]) == (name, len(row["text"]))
        truth = {
            "gender": str(int(FEMALE in items(name, "P21"))),
            "is_alive": str(int("P570" not in by_name[name])),
            "politics": str(int(DEMOCRATS in items(name, "P102"))),
            "occupation": {JOURNALIST: "journalist", ACTOR: "actor", SINGER: "singer", c.POLITICIAN: "politician",
                           FOOTBALLER: "athlete", BASKETBALLER: "athlete"}[min(items(name, "P106"))],
            "athlete": "soccer" if FOOTBALLER in items(name, "P106") else "basketball",
        }  # fmt: skip
        assert row["label"] == truth[row["task"]]
    people_of: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        people_of[row["task"], row["label"]].add(row["group"])
    assert {task for task, _ in people_of} == {task.name for task in c.TASKS}
    for task in ("gender", "politics", "is_alive"):
        assert len(people_of[task, "0"]) == len(people_of[task, "1"]) > 10
    assert len(people_of["occupation", "athlete"]) == 50 and len(people_of["athlete", "soccer"]) == 25


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_dataset_file_reads_what_is_built(
    build: Callable[..., int], people: list[dict[str, Any]], tmp_path: Path, suffix: str
) -> None:
    assert build([*CLASSES_OF_ITEMS, *people], out=f"people.{suffix}") == 0
    texts = dw.load_probe_texts([dw.UserData(str(tmp_path / f"people.{suffix}"))])
    jobs = ("actor", "athlete", "journalist", "politician", "singer")
    assert {probe.name for probe in texts.datasets[0].probes} == {
        "gender", "politics", "is_alive", *(f"occupation_is_{job}" for job in jobs), "athlete",
    }  # fmt: skip
    assert {mention.text[mention.start :] for mention in texts.mentions} <= {name_of(person) for person in people}
    assert all(mention.end == len(mention.text) for mention in texts.mentions)


def test_a_run_on_what_is_built(
    build: Callable[..., int], people: list[dict[str, Any]], tmp_path: Path, tiny_model: Path, tiny_saes: Path
) -> None:
    assert build([*CLASSES_OF_ITEMS, *people]) == 0
    ask = Request(tiny_model, (tiny_saes,), tmp_path / "people.jsonl", tmp_path / "out").plus("--layers", "0")
    assert ask.run() == 0
    (path,) = files(ask.out)
    layer = numbers(ask.out)[path.name]["layer_0"]
    asked = defaultdict(set)
    for row in rows_of(tmp_path / "people.jsonl"):
        asked[row["task"]].add(row["group"])
    for probe, task in {"gender": "gender", "occupation_is_actor": "occupation", "athlete": "athlete"}.items():
        assert layer[probe]["n_people"] == layer[probe]["n_rows"] == len(asked[task])
        assert 0 < layer[probe]["model_sel"] <= 1


def test_every_compression_gives_the_same_result(tmp_path: Path, people: list[dict[str, Any]], texts: Path) -> None:
    plain, text = dump_bytes([*CLASSES_OF_ITEMS, *people]), (texts / "all.txt").read_bytes()
    lines = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in text.decode().split("\n\n"))
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
            ".zst": zstandard.ZstdCompressor().compress}  # fmt: skip
    made = []
    for suffix, packed in pack.items():
        (tmp_path / f"dump.json{suffix}").write_bytes(packed(plain))
        folder = tmp_path / f"texts{suffix}" / "below"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"a.jsonl{suffix}").write_bytes(packed(lines))
        out = tmp_path / f"out{suffix}.jsonl"
        argv = [str(tmp_path / f"dump.json{suffix}"), str(folder.parent), "-o", str(out), "--quiet"]
        (tmp_path / "texts" / "all.txt").unlink(missing_ok=True)
        assert build_wikidata.main(argv) == 0
        made.append(out.read_bytes())
    assert len(made[0]) > 10_000
    assert set(made) == {made[0]}


def test_the_same_request_gives_the_same_file_in_every_process(tmp_path: Path, people: list, texts: Path) -> None:
    plain = dump_bytes([*CLASSES_OF_ITEMS, *people])
    (tmp_path / "dump.json").write_bytes(plain)

    def built(hash_seed: str, source: str, *flags: str) -> bytes:
        out = tmp_path / "out.csv"
        command = [sys.executable, str(ROOT / "scripts" / "build_wikidata.py"), source, str(texts), "-o", str(out)]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([*command, "--overwrite", *flags], env=environment, input=plain, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert b"people" in done.stdout
        return out.read_bytes()

    first = built("1", str(tmp_path / "dump.json"))
    assert built("2", "-") == first
    assert built("2", "-", "--seed", "5") != first


def test_lines_that_are_not_entities_are_counted_and_skipped(
    build: Callable[..., int], people: list[dict[str, Any]], tmp_path: Path, caplog: Any
) -> None:
    assert build([*CLASSES_OF_ITEMS, *people]) == 0
    whole = (tmp_path / "people.jsonl").read_bytes()
    caplog.clear()
    broken_claims = human("Anna Lindmann") | {"claims": {"P31": [{"rank": "normal", "mainsnak": "Q5"}]}}
    half = json.dumps(people[0])[:200]
    deep = '{"id":"Q5","a":' + "[" * 100_000 + "]" * 100_000 + "}"
    bad = [half, "", "null", '"Q5"', '["Q5"]', '{"id":"Q5",}', '{"id":"Q5"}', broken_claims, deep, '{"Q5":1} {"Q5":2}',
           "\x00\x01", "{\ud800}".encode("utf-8", "replace").decode()]  # fmt: skip
    assert build([*CLASSES_OF_ITEMS, *bad, *people], "--overwrite") == 0
    assert (tmp_path / "people.jsonl").read_bytes() == whole
    (warning,) = [line for line in caplog.messages if "entities" in line]
    assert re.search(r"dump\.json: skipped 9 of \d+ lines, which are not entities", warning), warning


def test_an_endless_line_is_skipped(build: Callable[..., int], people: list, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(dump, "LONGEST_LINE", 20_000)
    tally = dump.Tally()
    (tmp_path / "dump.json").write_bytes(dump_bytes(['{"id":"Q5' + "x" * 90_000 + '"}', *people]))
    found = list(dump.entities(str(tmp_path / "dump.json"), tally, lambda n: None))
    assert (len(found), tally.malformed, tally.lines) == (len(people), 1, len(people) + 1)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_truncated_dump_is_used_up_to_its_end(
    tmp_path: Path, people: list[dict[str, Any]], texts: Path, caplog: Any, pack: Callable[[bytes], bytes]
) -> None:
    suffix = {gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".xz"}[pack]
    padding = [entity(i, "x", {"P31": [571]}) | {"noise": random.Random(i).randbytes(3000).hex()} for i in range(700)]
    whole = pack(dump_bytes([*CLASSES_OF_ITEMS, *people, *padding]))
    (tmp_path / f"d.json{suffix}").write_bytes(whole[: len(whole) - 20_000])
    assert (
        build_wikidata.main([str(tmp_path / f"d.json{suffix}"), str(texts), "-o", str(tmp_path / "o.jsonl"), "--quiet"])
        == 0
    )
    assert "the file is truncated" in caplog.text
    assert len({row["group"] for row in rows_of(tmp_path / "o.jsonl")}) > 100


def test_a_dump_without_classes_says_who_counts_as_an_athlete(
    build: Callable[..., int], people: list, caplog: Any
) -> None:
    assert build(people) == 0
    assert "only people of the five sports count as athletes" in caplog.text


def test_a_task_with_fewer_than_two_classes_is_excluded(
    build: Callable[..., int], people: list, tmp_path: Path, caplog: Any
) -> None:
    republicans = [
        p for p in people if "P102" not in p["claims"] or str(DEMOCRATS) not in json.dumps(p["claims"]["P102"])
    ]
    assert build([*CLASSES_OF_ITEMS, *republicans]) == 0
    assert "politics Democratic Party (0 found), politics Republican Party (12 found)" in caplog.text
    assert "politics" not in {row["task"] for row in rows_of(tmp_path / "people.jsonl")}


def test_the_most_prominent_of_a_class_are_taken() -> None:
    known = [
        human(f"Anna Known{'abcdef'[i]}", P21=[FEMALE], **{f"P{n}": [1] for n in range(1000, 1000 + i)})
        for i in range(6)
    ]
    men = [human(f"Otto Known{'abcdef'[i]}", P21=[MALE]) for i in range(3)]
    names = table_of(*known, *men)
    finder = MentionFinder(names, 600, 1, 0)
    for person in known + men:
        finder.search(name_of(person))
    rows, counts = selection.select(names, finder.found, 1, 4)
    assert [row.group for row in rows if row.label == "1"] == ["Anna Knownf", "Anna Knowne", "Anna Knownd"]
    assert [row.group for row in rows if row.label == "0"] == ["Otto Knowna", "Otto Knownb", "Otto Knownc"]
    as_many = [selection.ClassCount("gender", "female", 6, 3, 3), selection.ClassCount("gender", "male", 3, 3, 3)]
    assert [count for count in counts if count.found] == as_many
    assert [row.group[-1] for row in selection.select(names, finder.found, 1, 2)[0]] == ["f", "e", "a", "b"]
    assert selection.select(names, finder.found, 3, 4)[0] == rows
    assert selection.select(names, finder.found, 4, 4)[0] == []


def test_classes_with_too_few_people_are_excluded() -> None:
    jobs = [ACTOR] * 5 + [SINGER] * 3 + [JOURNALIST] * 2
    persons = [human(f"Anna Known{i}", P106=[job]) for i, job in enumerate(jobs)]
    finder = MentionFinder(table_of(*persons), 600, 1, 0)
    for person in persons:
        finder.search(name_of(person))
    rows, counts = selection.select(table_of(*persons), finder.found, 3, 4)
    assert Counter(row.label for row in rows) == {"actor": 3, "singer": 3}  # two classes remain, with equal numbers
    assert [(n.name, n.found, n.people) for n in counts if n.found] == [
        ("journalist", 2, 0), ("actor", 5, 3), ("singer", 3, 3)
    ]  # fmt: skip


# --- what is refused, and what is left behind


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda f: [str(f / "none.json"), str(f / "texts")], "none.json: no such file"),
        (lambda f: [str(f / "texts"), str(f / "texts")], "no such file"),
        (lambda f: [str(f / "d.xml"), str(f / "texts")], "d.xml: unknown suffix"),
        (
            lambda f: [str(f / "d.json.gz"), str(f / "texts")],
            "d.json.gz: cannot be read after 0 lines (Not a gzipped file",
        ),
        (lambda f: [str(f / "d.json.bz2"), str(f / "texts")], "d.json.bz2: cannot be read after 0 lines"),
        (lambda f: [str(f / "d.json"), str(f / "texts")], "d.json: 2 lines and no person"),
        (lambda f: [str(f / "empty.json"), str(f / "texts")], "empty.json: 0 lines and no person"),
        (lambda f: [str(f / "good.json"), str(f / "nowhere")], "nowhere: no such folder"),
        (lambda f: [str(f / "good.json"), str(f / "hollow")], "hollow: there is no .txt or .jsonl file"),
        (lambda f: [str(f / "good.json"), str(f / "others")], "mentions 0 of"),
        (lambda f: [str(f / "good.json"), str(f / "torn")], "b.txt.gz: cannot be read"),
        (lambda f: [str(f / "good.json"), str(f / "texts"), "-o", str(f / "o.xlsx")], "unknown suffix '.xlsx'"),
        (lambda f: [str(f / "good.json"), str(f / "texts"), "-o", str(f / "good.jsonl")], "already exists"),
        (
            lambda f: [str(f / "good.json"), str(f / "texts"), "-o", str(f / "no" / "o.csv")],
            "is missing or not writable",
        ),
    ],
)
def test_invalid_requests_give_one_line_and_leave_no_file(
    tmp_path: Path, people: list, texts: Path, capsys: Any, make: Callable[[Path], list[str]], told: str
) -> None:
    contents = {
        "d.xml": b"<a/>", "d.json.gz": b"{}", "d.json.bz2": b"{}", "d.json": b"a\nb\n", "empty.json": b"",
        "good.json": dump_bytes(people), "good.jsonl": b"", "others/a.txt": b"we met nobody", "hollow/a.pdf": b"",
        "torn/b.txt.gz": gzip.compress(bytes(99))[:-9],
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert build_wikidata.main(["-o", str(tmp_path / "o.jsonl"), "--quiet", *make(tmp_path)]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING")]
    assert error.startswith("error: ") and told in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("flags", [["--context", "0"], ["--per_class", "-1"], ["--per_name", "x"], ["--such"]])
def test_wrong_flags_end_with_2(tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_wikidata.main(["d.json", "texts", "-o", str(tmp_path / "o.csv"), *flags])
    assert ended.value.code == 2


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (OSError("disk full"), 1)])
def test_a_failed_write_keeps_the_old_file(
    build: Callable[..., int], people: list, tmp_path: Path, monkeypatch: Any, capsys: Any, error: Any, code: int
) -> None:
    (tmp_path / "people.jsonl").write_text("old")
    calls = count()
    real = json.dumps

    def stopping(*args: Any, **more: Any) -> str:
        if next(calls) == 20:
            raise error
        return real(*args, **more)

    monkeypatch.setattr(
        output.json, "dumps", lambda *a, **m: stopping(*a, **m) if "ensure_ascii" in m else real(*a, **m)
    )
    assert build([*CLASSES_OF_ITEMS, *people], "--overwrite") == code
    assert next(calls) == 21
    assert (tmp_path / "people.jsonl").read_text() == "old"
    assert not list(tmp_path.glob(".*"))
    assert "nothing was written" in capsys.readouterr().err


def test_an_interrupt_leaves_no_file(tmp_path: Path, texts: Path) -> None:
    out = tmp_path / "o.jsonl"
    command = [sys.executable, str(ROOT / "scripts" / "build_wikidata.py"), "-", str(texts), "-o", str(out), "--quiet"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stderr is not None
        for line in (
            dump_bytes(crowd(100)).splitlines(keepends=True) * 20
        ):  # more than a pipe holds, so it is being read
            process.stdin.write(line)
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
        assert process.wait(30) == 130
    assert told.decode() == "interrupted: nothing was written\n"
    assert not out.exists() and not list(tmp_path.glob(".*"))
