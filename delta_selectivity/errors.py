"""The exception for an invalid request."""

from __future__ import annotations

import re

FIELD = re.compile(r"`(\w+)`")
"""Matches a parameter or `Settings` field in a message; the command line replaces it with its flag."""


class RequestError(ValueError):
    """An invalid request.

    The message is one line, shows the offending value and says what to do. Field names are in backticks.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(part.strip() for part in message.splitlines())
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))

    @property
    def field(self) -> str | None:
        """The invalid field: the first one that the message names; None if it names none."""
        found = FIELD.search(str(self))
        return found.group(1) if found else None
