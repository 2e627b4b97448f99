"""Timing of a run's stages."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds per named stage; thread-safe.

    On CUDA, stages measure host time: asynchronous work counts in the stage that waits for it.
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
        """Return seconds per stage so far, summed over threads, in order of first use, and the total wall time."""
        with self._lock:
            stages = {**self._seconds, "total": time.perf_counter() - self._start}
        return {name: round(value, 3) for name, value in stages.items()}
