"""Print text from files safely, also to a terminal that is closed.

>>> one_line("gen\\x1b[2Jder\\n")
'gen\\\\x1b[2Jder'
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

NOTE = 25  # level of a log line that is neither a warning nor a detail: shown by the programs
logging.addLevelName(NOTE, "NOTE")
LINE_SHOWN = 1000  # characters of any line: what a file holds may be quoted in it


def printable(text: str) -> str:
    """The text with the escapes of what does not print: control and formatting characters, line ends among them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """The printable text on one line, runs of whitespace as one space."""
    return printable(" ".join(text.split()))


class LineFormatter(logging.Formatter):
    """LEVEL: message, on one line each; tracebacks below it keep their lines."""

    def __init__(self, rewrite: Callable[[str], str] = str) -> None:
        """rewrite: applied to every message."""
        super().__init__("%(levelname)s: %(message)s")
        self._rewrite = rewrite

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(self._rewrite(super().formatMessage(record)))

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


def show(text: str) -> None:
    """Print for a reader who may be gone (`| head -1`, a closed terminal): the results are on disk all the same."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot spell is no failure
    try:
        print(text, flush=True)
    except OSError as error:
        if error.errno not in {errno.EPIPE, errno.EIO}:
            raise
        with suppress(OSError, ValueError):  # what is left in the buffer must have somewhere to go at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell_terminal(line: str) -> None:
    """One line on stderr if that is a terminal: that something goes on is of no use in a log."""
    with suppress(AttributeError, ValueError):  # no stream, or a closed one
        if sys.stderr.isatty():
            tell(line)


def tell(line: str) -> None:
    """One line on stderr, whatever the text; silent if nobody is there."""
    line = one_line(line)
    if len(line) > LINE_SHOWN:
        line = f"{line[:LINE_SHOWN]}..."
    if sys.stderr is not None:
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)
