"""What a person at the terminal sees while a run goes on, and where its seconds went."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
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


class ProgressBars:
    """One bar for texts and one for probes, with rate, time left and queue depth; silent if `quiet`.

    A bar is a courtesy: a terminal that is gone ends the bars, never the run.
    """

    def __init__(self, n_texts: int, n_probes: int, queue: BoundedQueue[Any], quiet: bool) -> None:
        self._queue = queue
        self._bars: list[Any] = []
        if not quiet and sys.stderr is not None:
            self._draw(lambda: self._add(n_texts, "text"))
            self._draw(lambda: self._add(n_probes, "probe"))

    def texts(self, n: int) -> None:
        """`n` more texts went through the model."""
        self._draw(lambda: self._update(0, n, f"queue {self._queue.nbytes / 1024**2:.0f} MB"))

    def probes(self, n: int) -> None:
        """`n` more (probe, layer, SAE) results are on disk."""
        self._draw(lambda: self._update(1, n))

    def _add(self, total: int, unit: str) -> None:
        self._bars.append(tqdm(total=total, desc=f"{unit + 's':6}", unit=unit, position=len(self._bars), smoothing=0.1))

    def _update(self, place: int, n: int, postfix: str | None = None) -> None:
        if len(self._bars) < 2:
            return
        if postfix is not None:
            self._bars[place].set_postfix_str(postfix, refresh=False)
        self._bars[place].update(n)

    def _draw(self, step: Callable[[], None]) -> None:
        try:
            step()
        except OSError:  # EPIPE from a closed pipe, EIO from a closed terminal
            for bar in self._bars:
                bar.disable = True  # its `close` writes no more either
            self._bars = []

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bar in self._bars:
            self._draw(bar.close)
