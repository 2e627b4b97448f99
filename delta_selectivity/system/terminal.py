r"""Safe output of text from files, also to a closed terminal.

>>> one_line("gen\x1b[2Jder\n")
'gen\\x1b[2Jder'
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

NOTE = 25  # log level between INFO and WARNING, shown by the programs
logging.addLevelName(NOTE, "NOTE")
LINE_SHOWN = 1000  # maximum characters of a line, which may quote a file


def printable(text: str) -> str:
    """Return the text with unprintable characters escaped: control and formatting characters, including newlines."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """Return the printable text on one line, with runs of whitespace reduced to one space."""
    return printable(" ".join(text.split()))


class LineFormatter(logging.Formatter):
    """Formats each record as LEVEL: message on one line; tracebacks follow on their own lines."""

    def __init__(self, rewrite: Callable[[str], str] = str) -> None:
        """Create a formatter that applies `rewrite` to every message."""
        super().__init__("%(levelname)s: %(message)s")
        self._rewrite = rewrite

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(self._rewrite(super().formatMessage(record)))

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


def show(text: str) -> None:
    """Print text to stdout; a closed stdout (`| head -1`, a closed terminal) is ignored, since results are on disk."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name outside the terminal's encoding must not fail
    try:
        print(text, flush=True)
    except OSError as error:
        if error.errno not in {errno.EPIPE, errno.EIO}:
            raise
        with suppress(OSError, ValueError):  # Python flushes the rest of the buffer at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_status(line: str) -> None:
    """Print a status line on stderr if it is a terminal, not into a log."""
    with suppress(AttributeError, ValueError):  # missing or closed stream
        if sys.stderr.isatty():
            show_on_stderr(line)


def show_on_stderr(line: str) -> None:
    """Print one line on stderr, if there is a stderr."""
    line = one_line(line)
    if len(line) > LINE_SHOWN:
        line = f"{line[:LINE_SHOWN]}..."
    if sys.stderr is not None:
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)
