"""Shorten names while keeping them distinct.

>>> apart(["sae_release_average_l0_32", "sae_release_average_l0_64"], 12)
['…e_l0_32', '…e_l0_64']
"""

from __future__ import annotations

from collections.abc import Sequence

KEPT = 5  # characters of a common prefix or suffix to keep, enough to recognise a word


def abridged(text: str, room: int) -> str:
    """Return the text, with its middle omitted if it is longer than `room` characters."""
    if len(text) <= room:
        return text
    head = (room - 1) // 2
    return f"{text[:head]}…{text[len(text) - (room - 1 - head) :]}".replace("……", "…")


def apart(names: Sequence[str], room: int) -> list[str]:
    """Return each name in at most `room` characters; common parts are omitted first, then the middle.

    Different names stay different: if necessary, they are numbered.
    """
    if all(len(name) <= room for name in names):
        return list(names)
    different = list(dict.fromkeys(names))
    short = _without_common(different) if len(different) > 1 else different
    short = [abridged(name, room) for name in short]
    if len(set(short)) < len(short):
        tails = [f"~{number}" for number in range(1, len(short) + 1)]
        short = [f"{abridged(name, room - len(tail))}{tail}" for name, tail in zip(short, tails, strict=True)]
    known = dict(zip(different, short, strict=True))
    return [known[name] for name in names]


def _without_common(names: Sequence[str]) -> list[str]:
    """Return the names without most of their common prefix and suffix."""
    begin = _left_out(_common(names))
    rest = [name[begin:] for name in names]
    end = _left_out(_common([name[::-1] for name in rest]))
    found = [name[: len(name) - end] for name in rest]
    return [f"{'…' if begin else ''}{name}{'…' if end else ''}" for name in found]


def _common(names: Sequence[str]) -> int:
    """Return the length of the common prefix."""
    columns = enumerate(zip(*names, strict=False))
    return next((place for place, column in columns if len(set(column)) > 1), min(map(len, names)))


def _left_out(common: int) -> int:
    """Return how many common characters to omit; 0 rather than 1, which the ellipsis would replace."""
    return common - KEPT if common > KEPT + 1 else 0
