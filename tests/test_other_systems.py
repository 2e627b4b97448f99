"""The program without features of Linux that other systems lack."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import numbers

from delta_selectivity.errors import RequestError
from delta_selectivity.run import row_store
from delta_selectivity.run.activations import Producer
from delta_selectivity.run.request import choose_devices
from delta_selectivity.system import cores, file_lock, interrupts, memory, processor

ROOT = Path(__file__).resolve().parent.parent

WITHOUT = """
import os, signal, sys
import filelock, joblib, multiprocessing.util, numba, pandas, subprocess, torch   # they have ways of their own
for name in ("fcntl", "resource"):
    sys.modules[name] = None                 # `import` of it raises ImportError
for name in ("posix_fallocate", "sched_getaffinity", "fork"):
    if hasattr(os, name):
        delattr(os, name)
del signal.SIGHUP
class Region:                                # as Windows locks: a region of an open file, at once or not at all
    LK_NBLCK = 2
    def locking(self, descriptor, mode, n): assert (mode, n) == (2, 1)
sys.modules["msvcrt"] = Region()
import pathlib
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self, **more: not str(self).startswith("/proc") and exists(self, **more)
from delta_selectivity.cli import main
sys.exit(main.main(sys.argv[1:]))
"""


def test_a_run_without_any_of_them_gives_the_same_numbers(with_cache, tmp_path):
    """Rows are also spilled to files, whose space is reserved differently."""
    here, there = with_cache.into(tmp_path / "here"), with_cache.into(tmp_path / "there").plus("--queue_gb", "1e-6")
    assert here.run() == 0
    command = [sys.executable, "-c", WITHOUT, *there.argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert numbers(there.out) == numbers(here.out)
    (path,) = there.out.glob("*.json")
    assert "peak_ram_gb" not in path.read_text()


def test_locks_on_windows_are_exclusive(tmp_path, monkeypatch):
    held: set[int] = set()

    def locking(descriptor: int, mode: int, n: int) -> None:
        place = os.fstat(descriptor).st_ino
        if place in held:
            raise PermissionError(13, "Permission denied")
        held.add(place)

    monkeypatch.setattr(file_lock, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))
    with file_lock.exclusive(tmp_path / "a"):
        with pytest.raises(file_lock.Locked), file_lock.exclusive(tmp_path / "a"):
            pass
        with file_lock.exclusive(tmp_path / "b"):
            pass


def test_open_files_on_windows_are_not_an_error(monkeypatch):
    def in_use(path: str) -> None:
        raise PermissionError(13, "The process cannot access the file because it is being used by another process")

    with monkeypatch.context() as windows:
        windows.setattr(row_store.os, "unlink", in_use)
        windows.delattr(row_store.os, "posix_fallocate")
        matrix = row_store._in_file(3, 5)
    matrix[:] = torch.arange(15.0).view(3, 5)
    np.testing.assert_array_equal(matrix.sum(dim=0), [15, 18, 21, 24, 27])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_an_error_without_fallocate(monkeypatch):
    monkeypatch.delattr(row_store.os, "posix_fallocate")
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        row_store._allocate(full.fileno(), 100)


def test_peak_memory_uses_the_unit_of_the_system(monkeypatch):
    monkeypatch.setattr(memory.resource, "getrusage", lambda who: types.SimpleNamespace(ru_maxrss=3 * 2**30))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.peak_memory()["peak_ram_gb"] == 3.0
    monkeypatch.setattr(sys, "platform", "linux")
    assert memory.peak_memory()["peak_ram_gb"] == 3 * 1024
    monkeypatch.setattr(memory, "resource", None)
    assert "peak_ram_gb" not in memory.peak_memory()


def test_missing_signals_are_not_handled(monkeypatch):
    with monkeypatch.context() as windows:
        windows.delattr(signal, "SIGHUP")
        assert importlib.reload(interrupts).SIGNALS == (signal.SIGINT, signal.SIGTERM)
    importlib.reload(interrupts)


def test_no_more_threads_than_a_container_may_use(monkeypatch):
    """Torch counts the cores of the machine."""
    monkeypatch.setattr(processor, "cpu_count", lambda: 2)
    monkeypatch.setattr(cores._threads, "enter", lambda: 64)
    monkeypatch.setattr(cores._threads, "leave", lambda: None)
    with cores.sharing_cores("cpu") as shared:
        assert shared.n == 2


def test_mps_is_a_device_of_models_and_not_of_probes(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_devices("mps", None) == ("mps", "cpu")
    assert choose_devices("mps:0", "cpu") == ("mps:0", "cpu")
    with pytest.raises(RequestError, match="probes need float64, which MPS lacks: use cpu"):
        choose_devices("cpu", "mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(RequestError, match="this machine has no MPS device"):
        choose_devices("mps", None)


def test_sums_of_mps_activations_are_computed_on_the_cpu(with_cache, tmp_path, monkeypatch):
    """The model reports MPS. Everything else must avoid MPS, which lacks float64 and does not exist on this machine."""
    plain, there = with_cache.into(tmp_path / "cpu"), with_cache.into(tmp_path / "mps")
    assert plain.run() == 0
    made = Producer.__init__

    class OnMps:
        device = torch.device("mps")

        def __init__(self, model):
            self.token_rows = model.token_rows

    seen = threading.Event()

    def on_mps(self, model, *more, **named):
        seen.set()
        made(self, OnMps(model), *more, **named)

    monkeypatch.setattr(Producer, "__init__", on_mps)
    assert there.run() == 0
    assert seen.is_set()
    assert numbers(there.out) == numbers(plain.out)
