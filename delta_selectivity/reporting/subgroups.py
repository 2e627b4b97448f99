"""Losses by subgroup of people: by length of the name, by how often the texts name it, by whatever the caller knows.

    found = losses(rows.stored, groupings(rows.stored, rows.kept, rows.places))
    with_q_values(found)[0]              # q over all looks

A subgroup's delta_sel is that of its rows alone. Whether it loses more than the others is another question: `against`
is its delta_sel minus that of all other people. A person is in one group of each grouping.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.probing.probe_statistics import ProbeScores, correct
from delta_selectivity.probing.uncertainty import Estimate, benjamini_hochberg, effective_people, estimate_delta
from delta_selectivity.records.texts import KeptTexts

LENGTHS = ((0, 10, "up to 10 characters"), (11, 14, "11 to 14"), (15, None, "15 or more"))
TIMES = ((0, 1, "once"), (2, 4, "2 to 4 times"), (5, None, "5 times or more"))
LEAST = 10  # effective people of each class, in the group and outside it: below, an interval says nothing
_WORD = re.compile(r"[^\W_]+")

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Grouping:
    """Groups of rows; no person is in two."""

    by: str
    names: tuple[str, ...]
    group: Ints  # [rows], place in `names`; -1: in none


@dataclass(frozen=True)
class Loss:
    """What a subgroup lost."""

    by: str
    group: str
    n_rows: int
    n_people: int
    delta_sel: Estimate
    against: Estimate  # its delta_sel minus that of all other people
    q_value: float | None = None  # of `against`, over all looks


def groupings(found: ProbeScores, kept: KeptTexts | None, places: Ints | None) -> list[Grouping]:
    """The groupings of a cell's rows that its texts, or else its people, allow."""
    if kept is None or places is None:
        _, person, n_rows = np.unique(found.persons, return_inverse=True, return_counts=True)
        return [] if n_rows.max() == 1 else [_by_size("rows of the person", n_rows[person], found.persons, TIMES)]
    lengths = np.array([text.end - text.start for text in kept.texts], dtype=np.int64)[places]
    times = times_named(kept)[places]
    return [
        _by_size("length of the name", lengths, found.persons, LENGTHS),
        _by_size("times that the texts name it", times, found.persons, TIMES),
    ]


def grouping_of(by: str, of_person: Mapping[str, str], kept: KeptTexts, places: Ints) -> Grouping:
    """A grouping that the caller knows: key of a person -> group. People who are not in it are in none."""
    names = tuple(sorted(set(of_person.values())))
    place = {name: i for i, name in enumerate(names)}
    of_text = np.array([place.get(of_person.get(text.person, ""), -1) for text in kept.texts], dtype=np.int64)
    return Grouping(by, names, of_text[places])


def losses(found: ProbeScores, by: Sequence[Grouping]) -> list[Loss]:
    """The loss of each group that has enough people, without q values."""
    change = correct(found, "sae") - correct(found, "model")
    told = []
    for grouping in by:
        known = grouping.group >= 0
        for place, name in enumerate(grouping.names):
            inside = grouping.group == place
            parts = [_estimate(found, change, rows) for rows in (inside, known & ~inside)]
            if parts[0] is not None and parts[1] is not None:
                n_people = len(np.unique(found.persons[inside]))
                against = _minus(parts[0], parts[1])
                told.append(Loss(grouping.by, name, int(inside.sum()), n_people, parts[0], against))
    return told


def with_q_values(found: Sequence[Loss]) -> list[Loss]:
    """The same with Benjamini-Hochberg over all of them: each look counts."""
    q_values = benjamini_hochberg([loss.against.p_value for loss in found]) if found else []
    return [replace(loss, q_value=q) for loss, q in zip(found, q_values, strict=True)]


@lru_cache(maxsize=8)
def times_named(kept: KeptTexts) -> Ints:
    """How often the words of each text's name stand in all of the texts, case and punctuation aside; [texts]."""
    asked = [_words(text.name) for text in kept.texts]
    beginning: dict[str, set[tuple[str, ...]]] = {}  # names by their first word
    for name in filter(None, asked):
        beginning.setdefault(name[0], set()).add(name)
    counts: Counter[tuple[str, ...]] = Counter()
    for text in dict.fromkeys(text.text for text in kept.texts):
        words = _words(text)
        counts.update(
            name for i, word in enumerate(words) for name in beginning.get(word, ()) if words[i : i + len(name)] == name
        )
    return np.array([counts[name] for name in asked], dtype=np.int64)


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))


def _by_size(by: str, values: Ints, persons: Ints, groups: Sequence[tuple[int, int | None, str]]) -> Grouping:
    """Groups by a number; of a person's rows the largest counts."""
    _, person = np.unique(persons, return_inverse=True)
    largest = np.zeros(person.max() + 1, dtype=np.int64)
    np.maximum.at(largest, person, values)
    of_row = largest[person]
    ends = np.array([least for least, *_ in groups[1:]])
    return Grouping(
        by, tuple(name for *_, name in groups), np.searchsorted(ends, of_row, side="right").astype(np.int64)
    )


def _estimate(found: ProbeScores, change: NDArray[np.float64], rows: NDArray[np.bool_]) -> Estimate | None:
    """delta_sel of some of the rows; None with too few people of a class."""
    labels, persons, weights = found.labels[rows], found.persons[rows], found.weights[rows]
    for label in (False, True):
        if not (labels == label).any() or effective_people(persons[labels == label], weights[labels == label]) < LEAST:
            return None
    return estimate_delta(change[:, rows], labels, persons, weights, found.n_folds)


def _minus(one: Estimate, other: Estimate) -> Estimate:
    """The difference of two means of different people, after Welch (1947)."""
    squares = [one.standard_error**2, other.standard_error**2]
    error = sum(squares)
    parts = sum(square**2 / estimate.degrees_of_freedom for square, estimate in zip(squares, (one, other), strict=True))
    freedom = error**2 / parts if parts else min(one.degrees_of_freedom, other.degrees_of_freedom)
    return Estimate(one.value - other.value, float(np.sqrt(error)), float(freedom))
