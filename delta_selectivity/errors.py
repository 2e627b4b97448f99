"""The exception for a wrong request."""

from __future__ import annotations

import re

FIELD = re.compile(r"`(\w+)`")
"""How a message marks the name of a parameter or of a field of `Settings`; the command line puts its flag there."""


class RequestError(ValueError):
    """The request is wrong.

    The message is a single line, whatever it quotes. It shows the offending value and says what to do. Fields stand in
    backticks.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(part.strip() for part in message.splitlines())
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))

    @property
    def field(self) -> str | None:
        """The field that is wrong: the first that the message names. None if it names none."""
        found = FIELD.search(str(self))
        return found.group(1) if found else None
