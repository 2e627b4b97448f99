"""Simulate units on workers that share the bandwidth of one storage (a discrete-event simulation of a whole release).

    simulate([Task(nbytes=2e9, seconds=30.0)] * 300, n_workers=8, bytes_per_second=1e9)   # -> Outcome

Each worker takes the next unit, reads its weights, and computes. Workers that read at the same time share the bandwidth
equally; there is no prefetching. `compute_selectivity.py` works in this way: Dask assigns a unit to the next free
worker.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One unit."""

    nbytes: float  # to read before computing
    seconds: float  # of computing


@dataclass(frozen=True)
class Outcome:
    """Total time, and how the workers spent it."""

    seconds: float  # from the start of the first unit to the end of the last one
    computing: float  # share of the workers' time
    reading: float  # share of the workers' time


def simulate(tasks: Sequence[Task], n_workers: int, bytes_per_second: float) -> Outcome:
    """Run the tasks in order."""
    waiting = list(reversed(tasks))
    reading: list[
        list[float]
    ] = []  # [bytes left to read, seconds of computing afterwards], one for each worker that reads
    computing: list[float] = []  # heap of the times at which workers become free
    now = busy_reading = busy_computing = 0.0
    idle = n_workers
    while waiting or reading or computing:
        while idle and waiting:
            task = waiting.pop()
            reading.append([task.nbytes, task.seconds])
            idle -= 1
        share = bytes_per_second / len(reading) if reading else 0.0
        first_read = now + min(left for left, _ in reading) / share if reading else float("inf")
        first_done = computing[0] if computing else float("inf")
        then = min(first_read, first_done)
        busy_reading += len(reading) * (then - now)
        busy_computing += len(computing) * (then - now)
        for reader in reading:
            reader[0] -= share * (then - now)
        now = then
        if first_done <= first_read:
            heapq.heappop(computing)
            idle += 1
            continue
        done = min(reading, key=lambda reader: reader[0])
        reading.remove(done)
        heapq.heappush(computing, now + done[1])
    return Outcome(now, busy_computing / (n_workers * now), busy_reading / (n_workers * now))
