"""Progress bars of a run."""

from __future__ import annotations

import sys
from contextlib import suppress
from types import TracebackType
from typing import Any

from tqdm import tqdm

from delta_selectivity.run.bounded_queue import BoundedQueue


class ProgressBars:
    """One bar for texts and one for probes, with rate, time left and queue depth; silent if `quiet`.

    A bar is a courtesy: a terminal that is gone ends the drawing, never the run.
    """

    def __init__(self, n_texts: int, n_probes: int, queue: BoundedQueue[Any], quiet: bool) -> None:
        self._queue = queue
        self._texts = self._probes = None
        if quiet:
            return  # a bar that is not drawn has a thread all the same
        stream: Any = Forgiving(sys.stderr)
        self._texts, self._probes = (
            tqdm(total=total, desc=f"{unit + 's':6}", unit=unit, position=place, smoothing=0.1, file=stream)
            for place, (total, unit) in enumerate(((n_texts, "text"), (n_probes, "probe")))
        )

    def texts(self, n: int) -> None:
        """`n` more texts went through the model."""
        if self._texts is None:
            return
        self._texts.set_postfix_str(f"queue {self._queue.nbytes / 1024**2:.0f} MB", refresh=False)
        self._texts.update(n)

    def probes(self, n: int) -> None:
        """`n` more (probe, layer, SAE) results are on disk."""
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


class Forgiving:
    """A stream that drops what cannot be written: a closed pipe or terminal, or none at all.

    tqdm must never see the error: it draws under a lock of its own that an exception leaves locked, and the other
    bar's thread would wait for it for ever.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, AttributeError):  # closed by the other side, by us, or None
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # encoding, isatty, fileno: how wide and how fancy to draw
