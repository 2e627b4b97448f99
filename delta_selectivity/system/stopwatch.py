"""Seconds per stage of a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds per named stage; safe to use from several threads.

    On CUDA a stage's seconds are those of the host: work that was only launched is counted where it is waited for.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            with self._lock:
                self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def seconds(self) -> dict[str, float]:
        """Seconds per stage so far, summed over threads, in the order in which they began; last the wall clock."""
        with self._lock:
            stages = {**self._seconds, "total": time.perf_counter() - self._start}
        return {name: round(value, 3) for name, value in stages.items()}
