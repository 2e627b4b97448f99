"""Find the names of millions of people in texts.

For each text, every pair of adjacent words is looked up among the first two words of all names. Matches are compared
with whole names, the longest first. An Aho-Corasick automaton would take gigabytes for ten million names; here, a name
takes 16 bytes.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from scripts.wikidata_build.entities import MAX_WORDS
from scripts.wikidata_build.people import Int64Array, Names

_WORD = re.compile(r"\w+")
_NO_TEXT = re.compile(
    "[\0\ufffd\ud800-\udfff]"
)  # replacements of invalid UTF-8, and characters that our files cannot store


@dataclass(frozen=True)
class Context:
    """A text that ends with a name, and the start of the name."""

    text: str
    start: int

    @property
    def name(self) -> str:
        """Return the name as the text spells it, on one line."""
        return " ".join(self.text[self.start :].split())


@dataclass
class Found:
    """Mentions of one name: a random sample of limited size, and their total number."""

    contexts: list[Context] = field(default_factory=list)
    seen: int = 0


class MentionFinder:
    """Finder of names in texts; after `search`, `found` has the mentions of each name.

    context: maximum number of characters before the name, starting at a word.
    per_name: number of mentions of each name to keep, drawn with `seed` (Vitter's algorithm R).
    """

    def __init__(self, names: Names, context: int, per_name: int, seed: int) -> None:
        self.found: dict[int, Found] = {}  # row in `names` -> mentions
        self._names, self._context, self._per_name = names, context, per_name
        self._random = random.Random(seed)

    def search(self, text: str) -> None:
        """Search a text, and keep its mentions."""
        for row, start, end in self._matches(text):
            context = _cut(text, start, end, self._context)
            if not _NO_TEXT.search(context.text):
                self._sample(self.found.setdefault(row, Found()), context)

    def _matches(self, text: str) -> list[tuple[int, int, int]]:
        """Yield (row in names, start, end) of every name, from left to right, without overlaps."""
        flat = text.replace("\n", " ")  # a name may be broken across two lines
        words = [match.span() for match in _WORD.finditer(flat)]
        pairs = np.fromiter((hash(flat[a:b]) for (a, _), (_, b) in pairwise(words)), np.int64, max(len(words) - 1, 0))
        matches = []
        free_from = 0
        for i in np.flatnonzero(_is_in(pairs, self._names.prefixes)).tolist():
            start = words[i][0]
            if start < free_from or _joined_before(flat, start):
                continue
            ends = [end for _, end in words[i + 1 : i + MAX_WORDS]]
            hashes = np.array([hash(flat[start:end]) for end in ends], np.int64)
            for j in np.flatnonzero(_is_in(hashes, self._names.hashes))[::-1].tolist():
                if not _joined_after(flat, ends[j]):
                    free_from = ends[j]
                    matches.append((int(np.searchsorted(self._names.hashes, hashes[j])), start, free_from))
                    break
        return matches

    def _sample(self, found: Found, context: Context) -> None:
        if context in found.contexts:
            return
        found.seen += 1
        if len(found.contexts) < self._per_name:
            found.contexts.append(context)
        elif (place := self._random.randrange(found.seen)) < self._per_name:
            found.contexts[place] = context


def _is_in(values: Int64Array, ascending: Int64Array) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Return which of `values` [n] are in `ascending`: bool [n]."""
    if not len(ascending):
        return np.zeros(len(values), np.bool_)
    places = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return np.asarray(ascending[places] == values)


def _joined_before(text: str, start: int) -> bool:
    """Return whether a hyphen joins the name to a word before: '-Ann Lee' of 'Mary-Ann Lee' is another name."""
    return start > 1 and text[start - 1] in "-‐‑" and text[start - 2].isalnum()


def _joined_after(text: str, end: int) -> bool:
    """Return whether a hyphen joins the name to a word after: 'Ann Lee-' of 'Ann Lee-Smith' is another name."""
    return text[end : end + 1] in {"-", "‐", "‑"} and text[end + 1 : end + 2].isalnum()


def _cut(text: str, start: int, end: int, room: int) -> Context:
    begin = max(0, start - room)
    if begin and not text[begin - 1].isspace():  # in the middle of a word
        begin = next((i for i in range(begin, start) if text[i].isspace()), start)
    while begin < start and text[begin].isspace():
        begin += 1
    return Context(text[begin:end], start - begin)
