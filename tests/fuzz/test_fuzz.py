"""A few hundred damaged files for every reader; `python tests/fuzz/readers.py` runs for longer."""

from __future__ import annotations

import logging

import pytest
from readers import READERS, fuzz


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def check(kind, tally):
    assert not tally.bugs, "\n\n".join(f"{where}\n{what}" for where, what in tally.bugs.items())
    assert tally.refused > tally.count / 20, f"{kind}: the damage is not damage: {tally}"


@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_read_correctly_or_rejected(kind, tmp_path):
    check(kind, fuzz(kind, tmp_path, count=300))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", READERS)
def test_fuzzing_for_ten_minutes(kind, tmp_path, capsys):
    tally = fuzz(kind, tmp_path, count=100_000, seconds=600, first_seed=300)
    with capsys.disabled():
        print(f" [{kind}: {tally}]", end="")
    check(kind, tally)
