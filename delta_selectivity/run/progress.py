"""Progress bars of a run."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from delta_selectivity.run.bounded_queue import BoundedQueue
from delta_selectivity.system.bars import open_bar


class ProgressBars:
    """One bar for texts and one for probes, with rate, time left and queue depth; silent if `quiet`.

    If the terminal is closed, drawing stops and the run continues.
    """

    def __init__(self, n_texts: int, n_probes: int, queue: BoundedQueue[Any], quiet: bool) -> None:
        self._queue = queue
        self._texts = self._probes = None
        if quiet:
            return  # tqdm would start a thread even for a bar that is not drawn
        self._texts, self._probes = (
            open_bar(total, f"{unit + 's':6}", unit, position=place)
            for place, (total, unit) in enumerate(((n_texts, "text"), (n_probes, "probe")))
        )

    def texts(self, n: int) -> None:
        """Count `n` more texts that the model has processed."""
        if self._texts is None:
            return
        self._texts.set_postfix_str(f"queue {self._queue.nbytes / 1024**2:.0f} MB", refresh=False)
        self._texts.update(n)

    def probes(self, n: int) -> None:
        """Count `n` more stored results (probe, layer, SAE)."""
        if self._probes is not None:
            self._probes.update(n)

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bar in (self._texts, self._probes):
            if bar is not None:
                bar.close()
