"""Only one run at a time writes a file, and files of a killed run do not block the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
from conftest import people, write_csv
from runs import ROOT, Request, left_over, substance

from delta_selectivity.errors import RequestError
from delta_selectivity.records.result_file import prepare_folder, reserve
from delta_selectivity.reporting.results import result_files
from delta_selectivity.system.file_lock import Locked, exclusive

HOLD = """
import sys, time
from pathlib import Path
from delta_selectivity.system.file_lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(path):
    """Start a process that holds the lock of `path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_is_exclusive_until_released(tmp_path):
    path = tmp_path / "m_d.json"
    with exclusive(path):
        with pytest.raises(Locked), exclusive(path):
            pass
        with exclusive(tmp_path / "other.json"):
            pass
        with pytest.raises(RequestError, match="no result files"):
            result_files(tmp_path)  # an unlocked lock file does not count
    with exclusive(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_run_is_released_and_its_files_removed(tmp_path):
    path = tmp_path / "m_d.json"
    with holder(path) as process:
        (tmp_path / f".m_d.json.{process.pid:08x}.tmp").write_text("half a fi")
        (tmp_path / f".writable.{process.pid:08x}.tmp").touch()
        with pytest.raises(RequestError, match="another run is writing this file"), reserve(path):
            pass
        process.send_signal(signal.SIGKILL)
    assert len(left_over(tmp_path)) == 3
    prepare_folder(tmp_path)
    with reserve(path):
        assert left_over(tmp_path) == [".m_d.json.lock"]
    assert left_over(tmp_path) == []


def test_many_processes_never_hold_the_lock_together(tmp_path):
    path = tmp_path / "m_d.json"
    inside, most, entered = [0], [0], [0]

    def compete():
        for _ in range(200):
            try:
                with exclusive(path):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    entered[0] += 1
                    inside[0] -= 1
            except Locked:
                pass

    threads = [threading.Thread(target=compete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1]
    assert entered[0] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_of_the_same_file_fails_with_one_line(tiny_model, tiny_saes, tmp_path, capsys):
    data = write_csv(tmp_path / "women.csv", people(60))
    ask = Request(tiny_model, (tiny_saes,), data, tmp_path / "out").plus("--layers", "0")
    (tmp_path / "out").mkdir()
    with holder(tmp_path / "out" / "pythia-tiny_women.json") as process:
        assert ask.run() == 2
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 1
        assert "another run is writing this file" in told[0]
        assert ask.into(tmp_path / "elsewhere").run() == 0
        process.kill()
    assert ask.run() == 0
    assert substance(ask.out) == substance(tmp_path / "elsewhere")
    assert left_over(tmp_path) == []


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    import fcntl

    def no_locks(descriptor, operation):
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with exclusive(tmp_path / "m_d.json"):
        pass
    assert "does not support locks" in caplog.text
