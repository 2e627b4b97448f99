"""Text from files on its way to a terminal: a name may hold what clears the screen or turns the order of letters.

>>> one_line("gen\\x1b[2Jder\\n")
'gen\\\\x1b[2Jder'
"""

from __future__ import annotations

import logging
from typing import Any


def printable(text: str) -> str:
    """The text with the escapes of what does not print: control and formatting characters, line ends among them."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def one_line(text: str) -> str:
    """The printable text on one line, runs of whitespace as one space."""
    return printable(" ".join(text.split()))


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()


class LineFormatter(logging.Formatter):
    """LEVEL: message, on one line each; tracebacks below it keep their lines."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(printable, super().formatException(ei).split("\n")))
