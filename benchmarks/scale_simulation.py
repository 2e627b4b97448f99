"""Units on workers that share one pipe to their storage: a discrete-event simulation of a whole release.

    simulate([Task(nbytes=2e9, seconds=30.0)] * 300, n_workers=8, bytes_per_second=1e9)   # -> Outcome

A worker takes the next unit, reads its weights, computes, and takes the next. Those who read at the same time share
the pipe equally; nobody reads ahead. That is what `compute_selectivity.py` does: Dask hands a unit to whoever is free.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One unit."""

    nbytes: float  # to read before it can compute
    seconds: float  # of computing


@dataclass(frozen=True)
class Outcome:
    """How long all of it took, and what workers did meanwhile."""

    seconds: float  # from the first unit's beginning to the last one's end
    computing: float  # share of the workers' time
    reading: float  # likewise


def simulate(tasks: Sequence[Task], n_workers: int, bytes_per_second: float) -> Outcome:
    """Run the tasks in their order."""
    waiting = list(reversed(tasks))
    reading: list[list[float]] = []  # [bytes left, seconds of computing to come], one for each reader
    computing: list[float] = []  # heap of times at which workers are free
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
