"""Threads that share cores: never more than there are, results in order, and no work after the consumer stops."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import pytest
import torch

from delta_selectivity.system import processor
from delta_selectivity.system.cores import Cores, sharing_cores


@pytest.fixture(autouse=True)
def _many_cores(monkeypatch):
    """Set the number of cores to torch's number of threads, whatever this machine has."""
    monkeypatch.setattr(processor, "cpu_count", lambda: 64)


class Busy:
    """Work that counts how many threads run it."""

    def __init__(self, seconds: float = 0.002, meeting: int = 1) -> None:
        """Set up the work; meeting: number of first items that wait for each other, however slow the machine is."""
        self.seconds, self.lock = seconds, threading.Lock()
        self.meeting, self.barrier = meeting, threading.Barrier(meeting)
        self.at_once = self.most = 0
        self.done: list[int] = []

    def __call__(self, item: int) -> int:
        with self.lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        if item < self.meeting:
            self.barrier.wait(timeout=30)
        time.sleep(self.seconds * (1 + item % 3))
        with self.lock:
            self.at_once -= 1
            self.done.append(item)
        return item * item


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("n_items", [0, 1, 2, 20])
def test_results_are_in_order(n: int, n_items: int) -> None:
    work = Busy(meeting=max(min(n, n_items), 1))
    found = list(Cores(n).map_in_order(range(n_items), work, "test"))
    assert found == [(i, i * i) for i in range(n_items)]
    assert work.most == min(n, n_items)


def test_two_kinds_of_work_share_the_cores_fairly() -> None:
    cores, work, ended = Cores(2), Busy(), []

    def all_of(name: str) -> None:
        for item, _ in cores.map_in_order(range(30), work, name):
            ended.append((name, item))

    threads = [threading.Thread(target=all_of, args=(name,)) for name in ("forward", "probes")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert work.most == 2
    assert len(ended) == 60
    last = {name: max(i for i, (of, _) in enumerate(ended) if of == name) for name in ("forward", "probes")}
    assert abs(last["forward"] - last["probes"]) < 15  # they take turns: neither waits for the end of the other


def test_cores_are_assigned_first_come_first_served() -> None:
    cores, served = Cores(1), []

    def take(i: int) -> None:
        with cores:
            served.append(i)

    with cores:
        threads = [threading.Thread(target=take, args=(i,)) for i in range(5)]
        for i, thread in enumerate(threads, 1):
            thread.start()
            while len(cores._turns) < i:
                time.sleep(0.001)
    for thread in threads:
        thread.join(timeout=30)
    assert served == [0, 1, 2, 3, 4]
    assert cores._free == 1


@pytest.mark.parametrize("n", [1, 2])
def test_errors_of_the_work_are_raised_and_free_the_core(n: int) -> None:
    cores = Cores(n)

    def work(item: int) -> int:
        if item == 3:
            raise ZeroDivisionError(item)
        return item

    found = []
    with pytest.raises(ZeroDivisionError):
        for item, _ in cores.map_in_order(range(50), work, "test"):
            found.append(item)
    assert found == [0, 1, 2]
    assert cores._free == n


def test_no_work_starts_after_the_consumer_stops() -> None:
    cores, work = Cores(2), Busy()
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    with closing(cores.map_in_order(items(), work, "test")) as found:
        assert next(found) == (0, 0)
    assert len(taken) <= 4
    assert len(work.done) <= 4
    assert cores._free == 2


def test_torch_stays_at_one_thread_until_the_last_user_of_the_cores_leaves():
    """In an earlier version, the first of two measurements to end gave the other's products several threads again."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    entered, go = threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        with sharing_cores("cpu") as cores:
            seen.append(cores.n)
            entered.set()
            go.wait(10)
            newborn = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            newborn.start()
            newborn.join()

    thread = threading.Thread(target=other)
    try:
        with sharing_cores("cpu"):
            thread.start()
            assert entered.wait(10)
        assert torch.get_num_threads() == 3
        go.set()
        thread.join(10)
        assert seen == [3, 1], "as many cores as there are, and one thread on each"
        late = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        late.start()
        late.join(10)
        assert seen[-1] == 3
    finally:
        torch.set_num_threads(before)


def test_threads_that_start_while_another_user_leaves_have_one_thread_too():
    """For a moment the default is what the leaving user had before; an SAE's figures then differed in the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with sharing_cores("cpu") as cores:
            leaving = threading.Thread(target=torch.set_num_threads, args=(3,))
            leaving.start()
            leaving.join()
            assert [n for _, n in Cores(2).map_in_order("abcd", seen_by_torch, "test")] == [3] * 4, "as it was"
            assert [n for _, n in Cores(2, cores._start_thread).map_in_order("abcd", seen_by_torch, "test")] == [1] * 4
    finally:
        torch.set_num_threads(before)


def seen_by_torch(_: str) -> int:
    return int(torch.get_num_threads())
