"""Progress bars: redrawn in place on a terminal, a few lines elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any

from tqdm import tqdm

MIN_SECONDS = 10.0  # between two lines
MIN_SHARE = 0.1  # of the total between two lines


def open_bar(total: int | None, desc: str, unit: str, position: int = 0, quiet: bool = False) -> tqdm | LineBar:
    """Return a bar on stderr: tqdm's on a terminal or in a notebook, a `LineBar` for a pipe or a file."""
    stream: Any = BestEffortStream(sys.stderr)
    if quiet or is_drawn_on(sys.stderr):
        return tqdm(total=total, desc=desc, unit=unit, position=position, smoothing=0.1, file=stream, disable=quiet)
    return LineBar(total, desc, unit, stream)


def is_drawn_on(stream: Any) -> bool:
    """Return whether a line on the stream can be redrawn."""
    with suppress(AttributeError, ValueError):  # missing or closed stream
        return bool(stream.isatty()) or "ipykernel" in sys.modules
    return False


class LineBar:
    """A bar with tqdm's interface that writes at most eleven lines, including the last."""

    def __init__(self, total: int | None, desc: str, unit: str, stream: Any) -> None:
        self.total, self.n = total, 0
        self._desc, self._unit, self._stream, self._postfix = desc.strip(), unit, stream, ""
        self._start = self._written_at = time.monotonic()
        self._written = 0

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Set the end of the next line."""
        self._postfix = text

    def update(self, n: int) -> None:
        """Add `n` to the progress."""
        self.n += n
        is_due = time.monotonic() - self._written_at >= MIN_SECONDS
        if is_due and self.n - self._written >= MIN_SHARE * (self.total or 0):
            self._write_line()

    def close(self) -> None:
        """Write the final progress, unless it is already written."""
        if self.n != self._written:
            self._write_line()

    def __enter__(self) -> LineBar:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _write_line(self) -> None:
        self._written, self._written_at = self.n, time.monotonic()
        parts = [f"{self._desc}: {self.n} of {self.total}, {self._written_at - self._start:.0f} s", self._postfix]
        self._stream.write(", ".join(part for part in parts if part) + "\n")
        self._stream.flush()


class BestEffortStream:
    """A stream that ignores write errors: a closed pipe or terminal, or a missing stream.

    tqdm draws under a lock that stays locked after an exception, so the thread of another bar would then wait forever.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, AttributeError):  # closed, or None
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # encoding, isatty, fileno
