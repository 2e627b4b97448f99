"""Shorten names while keeping them distinct.

>>> short_names(["sae_release_average_l0_32", "sae_release_average_l0_64"], 12)
['…e_l0_32', '…e_l0_64']
"""

from __future__ import annotations

from collections.abc import Sequence

KEPT = 5  # characters of a common prefix or suffix to keep, enough to recognise a word


def elide_middle(text: str, width: int) -> str:
    """Return the text, with its middle omitted if it is longer than `room` characters."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}".replace("……", "…")


def short_names(names: Sequence[str], width: int) -> list[str]:
    """Return each name in at most `room` characters; common parts are omitted first, then the middle.

    Different names stay different: if necessary, they are numbered.
    """
    if all(len(name) <= width for name in names):
        return list(names)
    different = list(dict.fromkeys(names))
    short = _without_common_parts(different) if len(different) > 1 else different
    short = [elide_middle(name, width) for name in short]
    if len(set(short)) < len(short):
        tails = [f"~{number}" for number in range(1, len(short) + 1)]
        short = [f"{elide_middle(name, width - len(tail))}{tail}" for name, tail in zip(short, tails, strict=True)]
    known = dict(zip(different, short, strict=True))
    return [known[name] for name in names]


def _without_common_parts(names: Sequence[str]) -> list[str]:
    """Return the names without most of their common prefix and suffix."""
    begin = _n_omitted(_common_prefix_length(names))
    rest = [name[begin:] for name in names]
    end = _n_omitted(_common_prefix_length([name[::-1] for name in rest]))
    short = [name[: len(name) - end] for name in rest]
    return [f"{'…' if begin else ''}{name}{'…' if end else ''}" for name in short]


def _common_prefix_length(names: Sequence[str]) -> int:
    """Return the length of the common prefix."""
    columns = enumerate(zip(*names, strict=False))
    return next((place for place, column in columns if len(set(column)) > 1), min(map(len, names)))


def _n_omitted(common: int) -> int:
    """Return how many common characters to omit; 0 rather than 1, which the ellipsis would replace."""
    return common - KEPT if common > KEPT + 1 else 0
