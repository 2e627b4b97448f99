"""A user's own data: the Hub's layout, names of columns and classes, splits, and the results of a run."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import os
import zipfile
from pathlib import Path
from typing import Any

import datasets as hf
import pytest
import test_datasets
import zstandard
from conftest import people, write_csv
from datasets.utils.extract import Extractor
from runs import Request, files, numbers

from delta_selectivity import tasks as dw
from delta_selectivity.errors import RequestError
from delta_selectivity.system import unpacked
from delta_selectivity.tasks import read_datasets
from delta_selectivity.tasks.people import last_word
from delta_selectivity.tasks.tokens import tokenise
from delta_selectivity.tasks.user_data import COLUMNS

SENTENCES = ["I saw Paris ", "I saw Rome", "Lyon is big"]
own = test_datasets.own


def labelled(
    sentences: list[str] = SENTENCES, classes: tuple[str, ...] = ("cold", "warm"), numbers: Any = (1, 0, 1)
) -> hf.Dataset:
    """Return columns with unusual names, and a label that is a number with a name, as in datasets of the Hub."""
    features = hf.Features(
        {"sentence": hf.Value("string"), "class": hf.ClassLabel(names=list(classes)), "author": hf.Value("string")}
    )
    authors = [f"a{i % 2}" for i in range(len(sentences))]
    return hf.Dataset.from_dict({"sentence": sentences, "class": list(numbers), "author": authors}, features=features)


TWO_CONFIGS = {"alps": {"train": labelled()}, "sea": {"train": labelled(["x", "y", "z"])}}
THEIR_COLUMNS = "text=sentence,label=class,group=author"


def write_hub_folder(folder: Path, configs: dict[str, dict[str, hf.Dataset]]) -> Path:
    """Write Parquet files and a card as `push_to_hub` does: config -> split -> rows."""
    (folder / "data").mkdir(parents=True)
    card = ["---", "configs:"]
    for config, splits in configs.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            path = f"data/{config}-{split}-00000-of-00001.parquet"
            rows.to_parquet(str(folder / path))
            card += [f"  - split: {split}", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join([*card, "---", "# A dataset", ""]), encoding="utf-8")
    return folder


# --- names of columns


@pytest.mark.parametrize(
    ("spec", "pairs"),
    [
        ("", ()),
        (" , ", ()),
        ("text=sentence", (("text", "sentence"),)),
        (" text = a sentence ,label=class=2", (("text", "a sentence"), ("label", "class=2"))),
        ("text=s,group=s", (("text", "s"), ("group", "s"))),
    ],
)
def test_columns_are_parsed(spec: str, pairs: tuple[tuple[str, str], ...]) -> None:
    assert dw.parse_columns(spec) == pairs


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("sentence", "write ours=yours"),
        ("text=", "write ours=yours"),
        ("=sentence", "there is no column ''"),
        ("words=sentence", "there is no column 'words'; there are text, label, group, start, end, task"),
        ("text=a,text=b", "text is already mapped to 'a'"),
    ],
)
def test_invalid_column_names_are_rejected(spec: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as error:
        dw.parse_columns(spec)
    assert "\n" not in str(error.value)


THEIRS: dict[str, str] = {name: f"their {name}" for name in COLUMNS}
RENAMED = ",".join(f"{ours}={theirs}" for ours, theirs in THEIRS.items())


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "folder"])
def test_columns_of_every_format_can_be_renamed(tmp_path: Path, kind: str) -> None:
    ours = [{**row, "task": "is_french"} for row in test_datasets.ROWS]
    theirs = [{THEIRS[name]: value for name, value in row.items()} | {"label": "not this"} for row in ours]
    paths = {}
    for name, rows in (("ours", ours), ("theirs", theirs)):
        folder = tmp_path / name
        folder.mkdir()
        table = hf.Dataset.from_list(rows)
        path = folder / (f"task.{kind}" if kind != "folder" else "task")
        write = {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet, "folder": table.save_to_disk}
        write[kind](str(path))
        paths[name] = path
    expected, found = own(paths["ours"]), own(paths["theirs"], columns=RENAMED)
    prints = [dw.dataset_fingerprint(texts, texts.datasets[0]) for texts in (expected, found)]
    assert prints[0] == prints[1]
    assert [probe.name for probe in found.datasets[0].probes] == ["is_french"]


def test_a_column_may_be_used_twice(tmp_path: Path) -> None:
    path = test_datasets.write_csv(tmp_path, [("a Rome", 1), ("a Rome", 1), ("b Rome", 0)])
    texts = own(path, columns="group=text")
    assert [mention.person for mention in texts.mentions] == ["a Rome", "b Rome"]


def test_a_missing_column_error_lists_the_columns(tmp_path: Path) -> None:
    path = test_datasets.write_csv(tmp_path, [("a", 1)], ("words", "kind"))
    with pytest.raises(RequestError, match=r"text=sentence: there is no column 'sentence'; found words, kind"):
        own(path, columns="text=sentence,label=kind")
    with pytest.raises(RequestError, match=r"missing column text; found label, words.* `columns` text="):
        own(path, columns="label=kind")


# --- names of classes


@pytest.mark.parametrize("kind", ["parquet", "saved", "hub"])
def test_class_names_are_used(tmp_path: Path, kind: str) -> None:
    rows = labelled([*SENTENCES, "we left Bern", "Graz"], ("cold", "mild", "warm"), (2, 0, 1, 0, 2))
    path = tmp_path / ("task.parquet" if kind == "parquet" else "task")
    if kind == "parquet":
        rows.to_parquet(str(path))
    elif kind == "saved":
        rows.save_to_disk(str(path))
    else:
        write_hub_folder(path, {"default": {"train": rows}})
    probes = own(path, columns=THEIR_COLUMNS).datasets[0].probes
    assert {probe.name: probe.labels.tolist() for probe in probes} == {
        "task_is_cold": [False, True, False, True, False],
        "task_is_mild": [False, False, True, False, False],
        "task_is_warm": [True, False, False, False, True],
    }


@pytest.mark.parametrize("kind", ["parquet", "hub"])
def test_rows_with_a_hidden_label_are_dropped_with_a_note(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = labelled(numbers=(1, -1, 0))
    path = tmp_path / ("task.parquet" if kind == "parquet" else "task")
    if kind == "parquet":
        rows.to_parquet(str(path))
    else:
        write_hub_folder(path, {"default": {"train": rows}})
    assert len(own(path, columns=THEIR_COLUMNS).mentions) == 2
    assert "1 of 3 rows have no label and are left out; the first is row 2" in caplog.text


# --- the Hub's layout


def test_a_folder_as_on_the_hub_reads_like_a_file(tmp_path: Path) -> None:
    hub = write_hub_folder(tmp_path / "weather", {"default": {"train": labelled(), "test": labelled(["x", "y", "z"])}})
    texts = own(hub, columns=THEIR_COLUMNS)
    assert [dataset.slug for dataset in texts.datasets] == ["weather"]
    assert [m.text for m in texts.mentions] == SENTENCES
    assert [m.person for m in texts.mentions] == ["a0", "a1", "a0"]
    assert texts.datasets[0].probes[0].labels.tolist() == [
        True,
        False,
        True,
    ]  # of a cold and a warm cache, the later is 1
    assert [m.text for m in own(hub, "test", THEIR_COLUMNS).mentions] == ["x", "y", "z"]


def test_a_dataset_on_the_hub_equals_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = write_hub_folder(tmp_path / "weather", TWO_CONFIGS)
    for function in ("get_dataset_config_names", "get_dataset_split_names", "load_dataset"):
        real = getattr(hf, function)

        def from_folder(name: str, *args: Any, real: Any = real, **more: Any) -> Any:
            assert name == "meteo/weather"
            assert "trust_remote_code" not in more
            if "cache_dir" in more:
                more["cache_dir"] = str(tmp_path / "cache")
            return real(str(hub), *args, **more)

        monkeypatch.setattr(hf, function, from_folder)
    texts = own("meteo/weather:sea", columns=THEIR_COLUMNS)
    assert [m.text for m in texts.mentions] == ["x", "y", "z"]
    assert texts.datasets[0].slug == "weather_sea"
    with pytest.raises(RequestError, match=r"several configs, give one as meteo/weather:alps: alps, sea"):
        own("meteo/weather", columns=THEIR_COLUMNS)


def test_configs_of_a_local_folder_are_named_like_those_of_the_hub(tmp_path: Path) -> None:
    hub = write_hub_folder(tmp_path / "weather", TWO_CONFIGS)
    texts = own(f"{hub}:sea", columns=THEIR_COLUMNS)
    assert [m.text for m in texts.mentions] == ["x", "y", "z"]
    assert texts.datasets[0].slug == "weather_sea"
    with pytest.raises(RequestError, match=r"has several configs.*alps, sea"):
        own(hub, columns=THEIR_COLUMNS)
    with pytest.raises(RequestError, match=r"no config 'lake'; found alps, sea"):
        own(f"{hub}:lake", columns=THEIR_COLUMNS)


@pytest.mark.parametrize("saved", [True, False])
def test_which_split_is_read(tmp_path: Path, saved: bool) -> None:
    def folder(name: str, splits: dict[str, list[str]]) -> Path:
        rows = {split: labelled(sentences) for split, sentences in splits.items()}
        if saved:
            hf.DatasetDict(rows).save_to_disk(str(tmp_path / name))
            return tmp_path / name
        return write_hub_folder(tmp_path / name, {"default": rows})

    one = folder("one", {"validation": ["x", "y", "z"]})
    assert [m.text for m in own(one, columns=THEIR_COLUMNS).mentions] == ["x", "y", "z"]
    several = folder("several", {"test": ["x", "y", "z"], "validation": ["u", "v", "w"]})
    with pytest.raises(RequestError, match=r"no split train, choose one with `split`: test, validation"):
        own(several, columns=THEIR_COLUMNS)
    with pytest.raises(RequestError, match=r"`split` dev: there is no such split; found test, validation"):
        own(several, "dev", THEIR_COLUMNS)
    assert [m.text for m in own(several, "validation", THEIR_COLUMNS).mentions] == ["u", "v", "w"]


def test_a_file_has_no_split(tmp_path: Path) -> None:
    path = test_datasets.write_csv(tmp_path, [("a", 1), ("b", 0)])
    with pytest.raises(RequestError, match="`split` train: a file has no splits"):
        own(path, "train")


def test_local_files_take_precedence_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(read_datasets, "read_hub", lambda data: pytest.fail("the Hub was asked"))
    labelled().save_to_disk("owner/name")
    assert len(own(Path("owner/name"), columns=THEIR_COLUMNS).mentions) == 3


def test_reading_a_local_folder_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = write_hub_folder(tmp_path / "weather", {"default": {"train": labelled()}})
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    own(hub, columns=THEIR_COLUMNS)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "tmp"])


def test_a_script_that_comes_with_a_dataset_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "README.md").write_text("A dataset.\n")
    (folder / "theirs.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'executed')!r}).touch()\n")
    with pytest.raises(RequestError, match="scripts are no longer supported"):
        own(folder)
    assert not (tmp_path / "executed").exists()


def test_an_unreachable_dataset_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **more: Any) -> None:
        logging.getLogger("huggingface_hub").warning("retrying")
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\n(LocalEntryNotFoundError)")

    monkeypatch.setattr(hf, "get_dataset_config_names", unreachable)
    with pytest.raises(RequestError) as error:
        own("owner/name")
    assert str(error.value) == (
        "`dataset_file` owner/name: cannot be loaded as a dataset (Couldn't reach 'owner/name' on the Hub)"
    )


@pytest.mark.parametrize("name", ["a/b/c", "../x", "/x/y", "~/x", "a/b.csv", "x" * 5000 + "/y", "a\0b/c", "ä/b", ""])
def test_invalid_hub_names_are_not_looked_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "get_dataset_config_names", lambda *a, **k: pytest.fail("the Hub was asked"))
    with pytest.raises(RequestError) as error:
        own(name)
    assert "\n" not in str(error.value)


# --- the rows


def test_spans_and_groups_hold_for_each_of_several_tasks(tmp_path: Path) -> None:
    rows = [
        {"text": "Ann met Bob", "label": "f", "group": "Ann", "start": 0, "end": 3, "task": "sex"},
        {"text": "Ann met Bob", "label": "m", "group": "Bob", "start": 8, "end": 11, "task": "sex"},
        {"text": "Ann met Bob", "label": 1, "group": "Ann", "start": 0, "end": 3, "task": "tall"},
        {"text": "Bob", "label": 0, "group": "Bob", "start": 0, "end": 3, "task": "tall"},
    ]
    texts = own(test_datasets.write_jsonl(tmp_path, rows))
    assert [(m.text[m.start : m.end], m.person) for m in texts.mentions] == [
        ("Ann", "Ann"),
        ("Bob", "Bob"),
        ("Bob", "Bob"),
    ]
    assert texts.persons[1] == texts.persons[2] != texts.persons[0]
    sex, tall = texts.datasets[0].probes
    assert (sex.name, sex.mentions.tolist(), sex.labels.tolist()) == ("sex", [0, 1], [False, True])
    assert (tall.name, tall.mentions.tolist(), tall.labels.tolist()) == ("tall", [0, 2], [True, False])


def test_one_text_in_two_tasks_may_have_two_labels_but_not_in_one(tmp_path: Path, caplog: Any) -> None:
    rows = [("a", 1, "x"), ("b", 0, "x"), ("a", 0, "y"), ("b", 1, "y"), ("c", 0, "y"), ("c", 1, "y"), ("c", 1, "y")]
    texts = own(test_datasets.write_csv(tmp_path, rows, ("text", "label", "task")))
    assert [probe.labels.tolist() for probe in texts.datasets[0].probes] == [[True, False], [False, True]]
    assert "my_task, y: dropped 1 texts with two labels" in caplog.text
    assert [m.text for m in texts.mentions] == ["a", "b"]


@pytest.fixture
def ask(tiny_model: Path, tiny_saes: Path, tmp_path: Path) -> Request:
    return Request(tiny_model, (tiny_saes,), Path(), tmp_path / "out").plus("--layers", "0")


def test_a_run_on_a_hub_folder_equals_one_on_its_csv(ask: Request, tmp_path: Path) -> None:
    rows = people(80)
    hub = write_hub_folder(tmp_path / "hub" / "women", {"default": {"train": hf.Dataset.from_list(rows)}})
    for data in (hub, write_csv(tmp_path / "women.csv", rows)):
        assert ask.into(tmp_path / f"out_{data.suffix}").plus("--dataset_file", str(data)).run() == 0
    from_hub, from_csv = (numbers(tmp_path / f"out_{suffix}") for suffix in ("", ".csv"))
    assert from_hub == from_csv
    assert list(from_hub) == ["pythia-tiny_women.json"]


def test_every_class_of_a_multi_class_task_is_a_probe_of_the_run(ask: Request, tmp_path: Path) -> None:
    rows = [row | {"label": "abc"[i % 3]} for i, row in enumerate(people(90))]
    assert ask.plus("--dataset_file", str(write_csv(tmp_path / "three.csv", rows))).run() == 0
    (path,) = files(ask.out)
    layer = json.loads(path.read_text())["layer_0"]
    assert {f"three_is_{value}" for value in "abc"} < layer.keys()
    assert [layer[f"three_is_{value}"]["n_pos"] for value in "abc"] == pytest.approx(
        [30] * 3, abs=9
    )  # minus duplicates


def test_truncated_texts_are_reported(tiny_model: Path, caplog: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = ["we met Ann", "so " * 300 + "Ann", "Ann" + " so" * 300]
    mentions = [dw.Mention(text, text.index("Ann"), text.index("Ann") + 3, "ann") for text in texts]
    found = tokenise(mentions, tokenizer, prepend_bos=True, max_length=64)
    assert [len(ids) for ids in found.ids][1:] == [64, 64]
    for ids, first, last in zip(found.ids, found.first, found.last, strict=True):
        assert tokenizer.decode(ids[first : last + 1]).strip() == "Ann"
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("2 of 3 texts are longer than the model's 64 tokens")
    caplog.clear()
    tokenise(mentions[:1], tokenizer, prepend_bos=True, max_length=64)
    assert not caplog.records


# --- spreadsheets and scripts of every kind


def seen(path: Path, columns: str = "") -> set[tuple[str, str, bool]]:
    """Return (text, probed part of it, label) of the only probe."""
    texts = own(path, columns=columns)
    ((probe,),) = (dataset.probes for dataset in texts.datasets)
    found = ((texts.mentions[m], bool(label)) for m, label in zip(probe.mentions, probe.labels, strict=True))
    return {(m.text, m.text[m.start : m.end], label) for m, label in found}


PLAIN = {("I saw Paris", "Paris", True), ("I saw Rome; twice", "twice", False), ("Lyon, is big", "big", True)}


def delimited(delimiter: str, names: tuple[str, str] = ("text", "label")) -> str:
    rows = [names, *((text, str(int(label))) for text, _, label in sorted(PLAIN))]
    return "".join(delimiter.join(f'"{cell}"' for cell in row) + "\r\n" for row in rows)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_delimiter_is_detected(tmp_path: Path, name: str, delimiter: str) -> None:
    path = tmp_path / name
    path.write_text(delimited(delimiter), encoding="utf-8-sig", newline="")
    assert seen(path) == PLAIN
    path.write_text(delimited(delimiter, ("sentence, long", "class;of")), encoding="utf-8", newline="")
    with pytest.raises(RequestError, match="missing columns text, label"):
        own(path)
    path.write_text(delimited(delimiter, ("sentence", "class")), encoding="utf-8", newline="")
    assert seen(path, "text=sentence,label=class") == PLAIN


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_a_table(tmp_path: Path, name: str, indent: int | None) -> None:
    path = tmp_path / name
    path.write_text(json.dumps([{"text": text, "label": label} for text, _, label in PLAIN], indent=indent))
    assert seen(path) == PLAIN
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, _, label in PLAIN))
    assert seen(path) == PLAIN


def test_cells_may_be_long(tmp_path: Path) -> None:
    long = "word " * 60_000 + "Paris"
    path = write_csv(tmp_path / "a.csv", [{"text": long, "label": 1}, {"text": "I saw Rome", "label": 0}])
    assert seen(path) == {(long, "Paris", True), ("I saw Rome", "Rome", False)}


def test_the_tilde_is_expanded_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_csv(tmp_path / "mine.csv", [{"text": t, "label": int(label)} for t, _, label in PLAIN])
    assert seen(Path("~/mine.csv")) == PLAIN
    assert dw.load_task("~/mine.csv").name == "mine"
    asked = dw.name_task("gender", data_dir="~/folders")
    assert isinstance(asked, dw.GurneeData) and asked.data_dir == tmp_path / "folders"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("我喜欢这部电影", "影"),
        ("我喜欢这部电影。", "影。"),
        ("好 看", "看"),
        ("私はテレビ", "テレビ"),
        ("彼女は東京タワー。", "タワー。"),
        ("ฉันรักแมว", "ว"),
        ("ภาพนี้", "นี้"),
        ("我爱New York", "York"),
        ("我爱Paris", "Paris"),
        ("。。。", "。。。"),
        ("안녕하세요 세계", "세계"),
        ("Привет, мир!", "мир!"),
        ("naïve café", "café"),
        ("看" * 5000, "看"),
    ],
)
def test_the_last_word_without_spaces_is_a_unicode_segment(text: str, word: str) -> None:
    start, end = last_word(text) or (0, 0)
    assert text[start:end] == word


def test_long_texts_without_spaces_are_measured_at_their_last_token(
    tiny_model: Path, tiny_saes: Path, tmp_path: Path
) -> None:
    """Tokenised byte by byte, each has 900 tokens, and the model has room for 128."""
    rows = [
        {"text": f"{chr(0x4E00 + i)}{'我喜欢' * 100}{'好' if i % 2 else '坏'}", "label": i % 2, "group": i}
        for i in range(40)
    ]
    path = write_csv(tmp_path / "电影.csv", rows)
    request = Request(tiny_model, (tiny_saes,), path, tmp_path / "out").plus("--layers", "1")
    assert request.run() == 0
    (file,) = files(tmp_path / "out")
    assert file.name == "pythia-tiny_电影.json"
    assert numbers(tmp_path / "out")[file.name]["layer_1"]["电影"]["n_rows"] == 40


def test_a_too_long_name_is_accepted_if_only_its_end_is_probed(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "看" * 100
    mention = dw.Mention(text, 0, 100, "x")
    with pytest.raises(RequestError, match="the name in the text"):
        tokenise([mention], tokenizer, prepend_bos=True, max_length=64)
    (ids,) = (found := tokenise([mention], tokenizer, prepend_bos=True, max_length=64, last_only=True)).ids
    assert len(ids) == 64 and found.first.tolist() == [1] and found.last.tolist() == [63]
    assert ids[1:].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"][-63:]


# --- files that decompress to a much larger size


@pytest.mark.parametrize("name", ["gz", "bz2", "xz", "zst", "zip"])
def test_a_compressed_file_is_rejected_before_it_fills_the_disk(name, tmp_path, monkeypatch):
    monkeypatch.setattr(unpacked, "ALWAYS_ALLOWED", 2**20)
    content = b"text,label\n" + b"0,1\n" * 2**20
    path = tmp_path / "rows.csv"  # the first bytes determine the file type
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}
    if name == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("rows.csv", content)
    else:
        path.write_bytes(pack[name](content))
    monkeypatch.setattr(Extractor, "extract", lambda *_args: pytest.fail("it is unpacked"))
    with pytest.raises(RequestError, match=r"rows\.csv: it decompresses from"):
        own(tmp_path)


def test_small_compressed_files_are_passed_to_their_reader(tmp_path):
    for pack in (gzip.compress, bz2.compress, lzma.compress, zstandard.compress):
        for content in (pack(b"rows"), pack(b"rows")[:-4], pack(b"rows")[:5], b"PK\x03\x04", b""):
            (tmp_path / "a").write_bytes(content)
            unpacked.check_archive(tmp_path / "a")


def test_a_parquet_table_is_refused_before_it_takes_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacked, "ALWAYS_ALLOWED", 2**20)
    rows = hf.Dataset.from_dict({"text": ["a b"] * 2**16, "label": [0, 1] * 2**15})
    rows.to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(RequestError, match="it decompresses from"):
        own(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_table_that_never_ends_is_refused(tmp_path, suffix, make):
    path = tmp_path / f"a.{suffix}"
    make(path)
    with pytest.raises(RequestError, match="a pipe or a device, not a file"):
        own(path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_table_of_terabytes_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.touch()
    os.truncate(path, 2**40)  # a sparse file, none of which is on the disk
    with pytest.raises(RequestError, match=r"decompresses from|not a readable Parquet file"):
        own(path)
