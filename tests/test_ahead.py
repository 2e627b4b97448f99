"""Work that a thread does ahead: its value, its error, and the texts that a new run tokenises in the meantime."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from delta_selectivity.errors import RequestError
from delta_selectivity.run import planning
from delta_selectivity.run.planning import make_plan
from delta_selectivity.run.request import Request
from delta_selectivity.settings import Settings
from delta_selectivity.system.ahead import Ahead
from delta_selectivity.tasks import UserData
from tests.runs import Request as Program


def test_a_value_is_computed_by_another_thread_before_it_is_asked_for():
    threads, computed = [], threading.Event()

    def compute() -> int:
        threads.append(threading.current_thread())
        computed.set()
        return 7

    value = Ahead(compute, "seven")
    assert computed.wait(10)
    assert value.result() == value.result() == 7
    assert [(thread.name, thread.daemon) for thread in threads] == [("seven", True)]
    assert threads[0] is not threading.current_thread()


def test_an_error_is_raised_where_the_value_is_asked_for():
    value = Ahead(lambda: 1 // 0, "broken")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            value.result()


@pytest.fixture
def request_(tiny_model: Path, tiny_saes: Path, people_csv: Path, tmp_path: Path) -> Request:
    settings = Settings(folds=3, repeats=1)
    return Request(
        str(tiny_model), (str(tiny_saes),), (UserData(str(people_csv)),), (0,), settings, tmp_path / "out", "cpu", "cpu"
    )


def test_a_new_run_tokenises_its_texts_ahead(request_):
    plans = [make_plan(request_, ahead=ahead) for ahead in (True, False)]
    assert [plan.ahead is not None for plan in plans] == [True, False]
    one, other = (plan.tokenise(plan.texts.mentions) for plan in plans)
    assert all(map(np.array_equal, one.ids, other.ids))
    assert np.array_equal(one.first, other.first) and np.array_equal(one.last, other.last)
    some = plans[0].texts.mentions[:3]
    assert len(plans[0].tokenise(some).ids) == 3, "other texts than all are tokenised when asked for"


def test_nothing_is_done_ahead_where_results_exist(request_, tiny_model, tiny_saes, people_csv):
    run = Program(tiny_model, (tiny_saes,), people_csv, request_.output).plus("--layers", "0")
    assert run.run() == 0
    assert make_plan(request_, ahead=True).ahead is None


def test_an_error_in_a_text_stops_the_run_in_one_line(monkeypatch, capfd, tiny_model, tiny_saes, people_csv, tmp_path):
    def broken(*_args):
        raise RequestError("the tokenizer gives no token for 'Ann'")

    monkeypatch.setattr(planning, "_tokenise", broken)
    assert Program(tiny_model, (tiny_saes,), people_csv, tmp_path / "out").run() == 2
    assert capfd.readouterr().err.splitlines() == ["error: the tokenizer gives no token for 'Ann'"]
