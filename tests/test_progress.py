"""Progress bars on a closed stream: no error, and no lock left locked."""

from __future__ import annotations

import sys
import threading

import pytest

from delta_selectivity.run.bounded_queue import BoundedQueue
from delta_selectivity.run.progress import ProgressBars
from delta_selectivity.system.stopwatch import Stopwatch


class Gone:
    """A stream whose reader has closed it."""

    encoding = "utf-8"

    def __init__(self, error, terminal):
        self.error, self.terminal = error, terminal

    def isatty(self):
        return self.terminal

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "EIO"), ValueError("closed file")])
def test_bars_ignore_a_closed_stream(monkeypatch, error, terminal):
    monkeypatch.setattr(sys, "stderr", Gone(error, terminal))
    queue = BoundedQueue[int](max_bytes=1, size_of=lambda item: 1)
    with ProgressBars(1000, 1000, queue, quiet=False) as bars:
        threads = [
            threading.Thread(target=lambda step=step: [step(1) for _ in range(1000)], daemon=True)
            for step in (bars.texts, bars.probes)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=10)
            assert not thread.is_alive(), "waits for a lock that nobody will open"


def test_bars_without_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with ProgressBars(1, 1, BoundedQueue[int](max_bytes=1, size_of=lambda item: 1), quiet=False) as bars:
        bars.texts(1)


def test_stages_are_summed_and_the_total_is_last():
    clock = Stopwatch()
    for _ in range(2):
        with clock.stage("forward"):
            pass
    assert list(clock.seconds()) == ["forward", "total"]
    assert clock.seconds()["total"] >= clock.seconds()["forward"]
