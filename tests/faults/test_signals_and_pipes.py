"""Ctrl-C at any moment, a closed terminal, a closed pipe: one line, the right exit code, no hang."""

from __future__ import annotations

import fcntl
import os
import pty
import random
import signal
import subprocess
import sys
import termios
import time

import pytest
from conftest import people, write_csv
from runs import ROOT, Request, left_over, numbers

from delta_selectivity.run.bounded_queue import BoundedQueue
from delta_selectivity.run.progress import ProgressBars
from delta_selectivity.system.interrupts import as_keyboard_interrupt

PYTHON_STARTS = 1.0  # seconds until our first line on a busy machine
EVERY_SIGNAL = pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)


@pytest.fixture
def ask(tiny_model, tiny_saes, tmp_path):
    """Return a request with three layers; `shown`: with bars and tables."""
    data = write_csv(tmp_path / "women.csv", people(80))
    return Request(tiny_model, (tiny_saes,), data, tmp_path / "out")


class Loud(Request):
    """A request with bars and tables."""

    @property
    def argv(self):
        return [flag for flag in super().argv if flag != "--quiet"]


@pytest.fixture
def loud(ask):
    return Loud(ask.model, ask.saes, ask.data, ask.out, ask.more)


def test_a_pipe_closed_after_one_line_changes_nothing(loud):
    with loud.start() as process:
        assert "pythia-tiny_women.json" in process.stdout.readline()
        process.stdout.close()
        told = process.stderr.read()
        assert process.wait(60) == 0
    assert "Traceback" not in told
    assert "BrokenPipe" not in told
    assert len(numbers(loud.out)["pythia-tiny_women.json"]) == 3


def test_both_streams_may_be_closed(loud):
    read, write = os.pipe()
    os.close(read)
    with loud.start(stdout=write, stderr=write) as process:
        os.close(write)
        assert process.wait(300) == 0
    assert len(numbers(loud.out)["pythia-tiny_women.json"]) == 3


def test_report_with_a_closed_pipe_and_with_a_full_disk(ask):
    assert ask.run() == 0
    command = [sys.executable, "report.py", str(ask.out)]
    options = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen(command, stdout=write, **options) as process:
        os.close(write)
        assert process.stderr.read() == ""
        assert process.wait(60) == 0
    with open("/dev/full", "w") as full, subprocess.Popen(command, stdout=full, **options) as process:  # noqa: PTH123
        told = process.stderr.read()
        assert process.wait(60) == 1
    (line,) = told.splitlines()
    assert "No space left" in line


@pytest.mark.slow
@pytest.mark.parametrize("closed", [[1], [2], [0, 1, 2]], ids=str)
def test_streams_may_be_missing_from_the_start(loud, closed):
    def close():
        for number in closed:
            os.close(number)

    with loud.start(stdout=None, stderr=None, stdin=None, preexec_fn=close) as process:
        assert process.wait(300) == 0
    assert len(numbers(loud.out)["pythia-tiny_women.json"]) == 3


@pytest.mark.slow
def test_a_table_that_cannot_be_written_fails_but_keeps_results(loud):
    with open("/dev/full", "w") as full, loud.start(stdout=full) as process:  # noqa: PTH123
        told = process.stderr.read()
        assert process.wait(300) == 1
    assert "No space left" in told.splitlines()[-1]
    assert len(numbers(loud.out)["pythia-tiny_women.json"]) == 3


def test_bars_on_a_closing_terminal_end_silently(monkeypatch):
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with ProgressBars(10, 10, BoundedQueue(1, lambda item: 1), quiet=False) as bars:
            bars.texts(1)
            os.close(read)
            for _ in range(9):
                time.sleep(0.02)
                bars.texts(1)
                bars.probes(1)
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            stream.close()


def test_no_bars_without_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with ProgressBars(10, 10, BoundedQueue(1, lambda item: 1), quiet=False) as bars:
        bars.texts(1)
        bars.probes(1)


def interrupt(ask, seconds, number=signal.SIGINT):
    """Start a run, wait, send the signal; return the exit code and the output."""
    with ask.start() as process:
        time.sleep(seconds)
        process.send_signal(number)
        try:
            _, told = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"hangs after {signal.Signals(number).name} at {seconds:.2f} s")
        return process.returncode, told


def check_interrupted(ask, seconds, number, undisturbed):
    code, told = interrupt(ask, seconds, number)
    where = f"{signal.Signals(number).name} at {seconds:.2f} s: {told}"
    if code == -number or ("Traceback" in told and "main.py" not in told):
        assert seconds < PYTHON_STARTS, where  # it had not yet reached our first line
        return
    assert code in {0, 130}, where
    assert "Traceback" not in told, where
    if code == 130:
        assert told.strip().splitlines()[-1].startswith("interrupted: "), where
    assert left_over(ask.out) == [], where
    found = numbers(ask.out).get("pythia-tiny_women.json", {})
    assert found.keys() <= undisturbed.keys()
    assert ask.run() == 0
    assert numbers(ask.out)["pythia-tiny_women.json"] == undisturbed, where


def how_long(ask, folder):
    start = time.perf_counter()
    with ask.into(folder).start() as process:
        assert process.wait(300) == 0
    return time.perf_counter() - start, numbers(folder)["pythia-tiny_women.json"]


def test_ctrl_c_during_and_after_start_up(ask, tmp_path):
    whole, undisturbed = how_long(ask, tmp_path / "whole")
    for i, share in enumerate([0.3, 0.6]):
        check_interrupted(ask.into(tmp_path / str(i)), share * whole, signal.SIGINT, undisturbed)


@EVERY_SIGNAL
def test_no_signal_is_lost_where_python_ignores_exceptions(number):
    """Check a signal during `__del__`; while modules load, a callback of Python's import ignores them too.

    A job in the background of a shell ignores Ctrl-C, but not the others.
    """

    class Signalled:
        def __del__(self):
            signal.raise_signal(number)

    hook = sys.unraisablehook
    before = None if number == signal.SIGINT else signal.signal(signal.SIGINT, signal.SIG_IGN)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt), as_keyboard_interrupt():
            Signalled()
            time.sleep(60)
        assert sys.unraisablehook is hook
        assert time.monotonic() - start < 30, "it wakes a thread that waits"
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


OUTSIDE_MAIN = """
import builtins, os, runpy, sys
sys.path[0] = os.getcwd()
from delta_selectivity.system import interrupts
number, moment = int(sys.argv[1]), sys.argv[2]
find, leave = builtins.__import__, interrupts.exit_now

def import_it(name, *rest):
    if name == moment:
        os.kill(os.getpid(), number)
    return find(name, *rest)

def leave_now(code):
    if moment == "leave":
        os.kill(os.getpid(), number)
    leave(code)

builtins.__import__, interrupts.exit_now, sys.argv = import_it, leave_now, ["main.py", "--layers", "nonsense"]
runpy.run_path("main.py", run_name="__main__")
"""


@EVERY_SIGNAL
@pytest.mark.parametrize("moment", ["logging", "delta_selectivity.cli.command_line", "leave"])
def test_a_signal_before_or_after_main_is_one_line(number, moment):
    """Check signals while the program is loading, and after `main` has reported."""
    command = [sys.executable, "-c", OUTSIDE_MAIN, str(int(number)), moment]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130, done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines.pop().startswith("interrupted: ")
    assert lines == [] or (moment == "leave" and lines[0].startswith("error: --layers 'nonsense'")), lines


@EVERY_SIGNAL
def test_ignored_signals_stay_ignored(number):
    """As under `nohup`, or in a background job."""

    def ignore():
        signal.signal(number, signal.SIG_IGN)

    command = [sys.executable, "-c", OUTSIDE_MAIN, str(int(number)), "delta_selectivity.cli.command_line"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False, preexec_fn=ignore)
    assert done.returncode == 2, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
@EVERY_SIGNAL
def test_a_signal_at_any_moment(ask, tmp_path, number):
    whole, undisturbed = how_long(ask, tmp_path / "whole")
    moments = random.Random(0)
    for i in range(16):
        seconds = moments.uniform(0.05, whole)
        check_interrupted(ask.into(tmp_path / str(i)), seconds, number, undisturbed)


@pytest.mark.slow
def test_a_closed_terminal_ends_the_run(loud):
    """The shell is gone: SIGHUP arrives, and every write to the terminal fails."""
    ours, theirs = pty.openpty()

    def on_this_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with loud.start(stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=on_this_terminal) as process:
        os.close(theirs)
        deadline = time.monotonic() + 60
        while b"texts" not in os.read(ours, 1 << 16):
            assert time.monotonic() < deadline
        os.close(ours)
        assert process.wait(60) in {0, 130}
    assert left_over(loud.out) == []
    assert loud.run() == 0
