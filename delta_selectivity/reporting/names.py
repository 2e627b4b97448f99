"""Shorten names so that they stay apart.

>>> apart(["sae_release_average_l0_32", "sae_release_average_l0_64"], 12)
['…e_l0_32', '…e_l0_64']
"""

from __future__ import annotations

from collections.abc import Sequence

KEPT = 5  # characters of a common beginning or end that stay: enough to see a word in


def abridged(text: str, room: int) -> str:
    """The text with its middle left out where it has more characters than this."""
    if len(text) <= room:
        return text
    head = (room - 1) // 2
    return f"{text[:head]}…{text[len(text) - (room - 1 - head) :]}".replace("……", "…")


def apart(names: Sequence[str], room: int) -> list[str]:
    """Each name in at most this many characters: what all have in common goes first, then middles.

    Names that differ stay different: as a last resort they are numbered.
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
    """The names with most of their common beginning and end left out."""
    begin = _left_out(_common(names))
    rest = [name[begin:] for name in names]
    end = _left_out(_common([name[::-1] for name in rest]))
    found = [name[: len(name) - end] for name in rest]
    return [f"{'…' if begin else ''}{name}{'…' if end else ''}" for name in found]


def _common(names: Sequence[str]) -> int:
    """How many characters all begin with."""
    columns = enumerate(zip(*names, strict=False))
    return next((place for place, column in columns if len(set(column)) > 1), min(map(len, names)))


def _left_out(common: int) -> int:
    """How many characters of what is common go; 0 rather than one, in whose place the mark would stand."""
    return common - KEPT if common > KEPT + 1 else 0
