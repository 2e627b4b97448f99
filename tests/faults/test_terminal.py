"""Names from data cannot break the terminal or a table: escapes, newlines, bars, bidirectional controls."""

from __future__ import annotations

import json
import re
import unicodedata

import pytest
from conftest import people, write_csv
from runs import Request, files, numbers

from delta_selectivity.reporting import results, tables
from delta_selectivity.system.terminal import one_line, printable
from delta_selectivity.tasks import UserData, describe_datasets

HOSTILE = "a\x1b[2J\x1b]0;title\x07|b\n\nlayer_9\r\u202eturned\u2028\x9b1mé"


def harmless(text):
    """Return whether a text has only printable characters and newlines."""
    return all(char == "\n" or unicodedata.category(char)[0] not in "CZ" or char == " " for char in text)


def test_every_character_prints_or_is_escaped():
    for char in {*map(chr, range(0x2100)), "\ud800", "\ufeff", "\ufff9", "\U000e0041"}:
        for shown in (printable(f"a{char}b"), one_line(f"a{char}b")):
            assert harmless(shown), f"{char!r}"
            assert "\n" not in shown
            assert char in shown or not char.isprintable()


def test_a_table_keeps_its_columns_for_any_names():
    table = tables.aligned([("layer", "probe"), ("0", HOSTILE), ("1", "women ")])
    head, rule, *rows = table.split("\n")
    assert harmless(table)
    assert len(rows) == 2
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in (head, rule, *rows)} == {3}
    assert "\\|b" in table
    assert r"\x1b[2J" in table


@pytest.fixture
def ask(tiny_model, tiny_saes, tmp_path):
    """Return a request on a task of this name, and one with too few people, whose reason is in the table."""
    few = [{**row, "label": i == 0} for i, row in enumerate(people(12, seed=3))]
    rows = [{**row, "task": HOSTILE} for row in people(60)] + [{**row, "task": f"few{HOSTILE}"} for row in few]
    request = Request(tiny_model, (tiny_saes,), write_csv(tmp_path / "women.csv", rows), tmp_path / "out")
    return request.plus("--layers", "0")


def test_a_run_on_a_task_with_a_hostile_name(ask):
    with ask.start() as quiet:
        _, warned = quiet.communicate(timeout=120)
    assert quiet.returncode == 0
    assert harmless(warned)
    assert all(line.startswith("WARNING: ") for line in warned.splitlines()), warned
    assert any("not measured" in line for line in warned.splitlines())
    assert set(numbers(ask.out)["pythia-tiny_women.json"]["layer_0"]) > {HOSTILE, f"few{HOSTILE}"}, (
        "the file has it whole"
    )
    shown = tables.render(results.load(files(ask.out)))
    assert harmless(shown)
    assert sum(line.startswith("| 0 ") for line in shown.splitlines()) == 2


def test_the_list_of_datasets(ask):
    listed = describe_datasets([UserData(str(ask.data))])
    assert harmless(listed)
    assert len(listed.splitlines()) == 3


def test_an_error_that_quotes_a_file(ask, capsys):
    assert ask.run() == 0
    (path,) = files(ask.out)
    content = json.loads(path.read_text())
    content["_run"]["key"]["positions"] = HOSTILE
    path.write_text(json.dumps(content))
    capsys.readouterr()
    assert ask.run() == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert harmless(told[0])
    assert r"\x1b[2J" in told[0]
