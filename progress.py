"""What a person at the terminal sees while a run goes on, and where its seconds went."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from tqdm import tqdm

from bounded_queue import BoundedQueue


class Stopwatch:
    """Seconds per named stage; safe to use from several threads.

    On CUDA a stage's seconds are those of the host: work that was only launched is counted where it is waited for.
    """

    def __init__(self) -> None:
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
        """Seconds per stage so far, in the order in which the stages began."""
        with self._lock:
            return {name: round(value, 3) for name, value in self._seconds.items()}


class ProgressBars:
    """One bar for texts and one for probes, with rate, time left and queue depth; silent if `quiet`."""

    def __init__(self, n_texts: int, n_probes: int, queue: BoundedQueue[Any], quiet: bool) -> None:
        self._queue = queue
        self._texts = tqdm(total=n_texts, desc="texts ", unit="text", disable=quiet, position=0, smoothing=0.1)
        self._probes = tqdm(total=n_probes, desc="probes", unit="probe", disable=quiet, position=1, smoothing=0.1)

    def texts(self, n: int) -> None:
        """`n` more texts went through the model."""
        self._texts.set_postfix_str(f"queue {self._queue.nbytes / 1024**2:.0f} MB", refresh=False)
        self._texts.update(n)

    def probes(self, n: int) -> None:
        """`n` more (probe, layer, SAE) results are on disk."""
        self._probes.update(n)

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._texts.close()
        self._probes.close()
