"""Losses by subgroup of people: by length or frequency of the name, or by groups that the caller passes.

    found = losses(rows.stored, groupings(rows.stored, rows.kept, rows.places))
    with_q_values(found)[0]              # q over all comparisons
    mean_losses(cells)                   # the same as a mean over cells

A subgroup's delta_sel is computed on its rows only. `against` is that delta_sel minus the delta_sel of all other
people; it measures whether the subgroup loses more. In a cell, a person is in one group of each grouping.
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
from delta_selectivity.probing.uncertainty import Cell, Estimate, benjamini_hochberg, effective_people, estimate_mean
from delta_selectivity.records.texts import KeptTexts

LENGTHS = ((0, 10, "up to 10 characters"), (11, 14, "11 to 14"), (15, None, "15 or more"))
TIMES = ((0, 1, "once"), (2, 4, "2 to 4 times"), (5, None, "5 times or more"))
MIN_PEOPLE = 10  # minimum effective people of each class, in the group and outside it, for a meaningful interval
_WORD = re.compile(r"[^\W_]+")
_DECADE = re.compile(r"(-?\d{1,4})s")

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Grouping:
    """A partition of the rows into groups; a person is in at most one of them."""

    by: str
    names: tuple[str, ...]
    group: Ints  # [rows], index in `names`; -1: none


@dataclass(frozen=True)
class Loss:
    """Loss of a subgroup, as a mean over cells."""

    by: str
    group: str
    n_cells: int
    n_rows: int  # sum over cells
    n_people: int  # each counted once
    delta_sel: Estimate
    against: Estimate  # its delta_sel minus that of all other people
    q_value: float | None = None  # of `against`, over all comparisons


def groupings(scores: ProbeScores, kept: KeptTexts | None, places: Ints | None) -> list[Grouping]:
    """Return the groupings of a cell's rows: from its texts if they are known, else from the number of rows."""
    if kept is None or places is None:
        _, person, n_rows = np.unique(scores.persons, return_inverse=True, return_counts=True)
        return [] if n_rows.max() == 1 else [_by_size("rows of the person", n_rows[person], scores.persons, TIMES)]
    lengths = np.array([text.end - text.start for text in kept.texts], dtype=np.int64)[places]
    times = times_named(kept)[places]
    return [
        _by_size("length of the name", lengths, scores.persons, LENGTHS),
        _by_size("times that the texts name it", times, scores.persons, TIMES),
    ]


def grouping_of(by: str, of_person: Mapping[str, str], kept: KeptTexts, places: Ints) -> Grouping:
    """Return a grouping from the caller: key of a person -> group. Other people have no group."""
    names = tuple(sorted(set(of_person.values())))
    place = {name: i for i, name in enumerate(names)}
    of_text = np.array([place.get(of_person.get(text.person, ""), -1) for text in kept.texts], dtype=np.int64)
    return Grouping(by, names, of_text[places])


def losses(scores: ProbeScores, by: Sequence[Grouping]) -> list[Loss]:
    """Return the loss of each group that has enough people, without q values."""
    return mean_losses([(scores, by)])


def mean_losses(cells: Sequence[tuple[ProbeScores, Sequence[Grouping]]]) -> list[Loss]:
    """Return the losses as means over cells; a cell counts for a group if the group and all others have enough people.

    All rows of a person count as one sampling unit (`uncertainty.estimate_mean`).
    Raises ValueError if cells differ in the number of repeats or folds.
    """
    parts: dict[str, dict[str, list[tuple[Cell, Cell]]]] = {}
    for scores, by in cells:
        change = (correct(scores, "sae") - correct(scores, "model")).astype(np.int8)  # small: there are many cells
        for grouping in by:
            known, of_group = grouping.group >= 0, parts.setdefault(grouping.by, {})
            for place, name in enumerate(grouping.names):
                inside = grouping.group == place
                two = [_part(scores, change, rows) for rows in (inside, known & ~inside)]
                if two[0] is not None and two[1] is not None:
                    of_group.setdefault(name, []).append((two[0], two[1]))
    return [_loss(by, name, of_group[name]) for by, of_group in parts.items() for name in sorted(of_group, key=_order)]


def _order(name: str) -> tuple[int, str]:
    """Return the sort key of a group: built-in groups by size, decades by time, others by name."""
    built_in = [group for groups in (LENGTHS, TIMES) for *_, group in groups]
    decade = _DECADE.fullmatch(name)
    return (int(decade[1]), "") if decade else (built_in.index(name) if name in built_in else 0, name)


def _loss(by: str, name: str, pairs: Sequence[tuple[Cell, Cell]]) -> Loss:
    """Return the mean over the cells of a group, and its difference from the mean of all others."""
    inside = [part for part, _ in pairs]
    twice = [replace(part, change=sign * 2 * part.change) for pair in pairs for sign, part in zip((1, -1), pair)]  # noqa: B905 - two each
    persons = np.concatenate([part.persons for part in inside])
    delta, against = estimate_mean(inside), estimate_mean(twice)
    return Loss(by, name, len(pairs), len(persons), len(np.unique(persons)), delta, against)


def with_q_values(losses: Sequence[Loss]) -> list[Loss]:
    """Return the losses with Benjamini-Hochberg q values over all of them."""
    q_values = benjamini_hochberg([loss.against.p_value for loss in losses]) if losses else []
    return [replace(loss, q_value=q) for loss, q in zip(losses, q_values, strict=True)]


@lru_cache(maxsize=8)
def times_named(kept: KeptTexts) -> Ints:
    """Return how often the words of each text's name occur in all texts, ignoring case and punctuation; [texts]."""
    names = [_words(text.name) for text in kept.texts]
    by_first_word: dict[str, set[tuple[str, ...]]] = {}  # names by their first word
    for name in filter(None, names):
        by_first_word.setdefault(name[0], set()).add(name)
    counts: Counter[tuple[str, ...]] = Counter()
    for text in dict.fromkeys(text.text for text in kept.texts):
        words = _words(text)
        counts.update(
            name
            for i, word in enumerate(words)
            for name in by_first_word.get(word, ())
            if words[i : i + len(name)] == name
        )
    return np.array([counts[name] for name in names], dtype=np.int64)


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))


def _by_size(by: str, values: Ints, persons: Ints, groups: Sequence[tuple[int, int | None, str]]) -> Grouping:
    """Return groups by ranges of a number; a person's group is that of the largest value in their rows."""
    _, person = np.unique(persons, return_inverse=True)
    largest = np.zeros(person.max() + 1, dtype=np.int64)
    np.maximum.at(largest, person, values)
    of_row = largest[person]
    ends = np.array([least for least, *_ in groups[1:]])
    return Grouping(
        by, tuple(name for *_, name in groups), np.searchsorted(ends, of_row, side="right").astype(np.int64)
    )


def _part(scores: ProbeScores, change: NDArray[np.int8], rows: NDArray[np.bool_]) -> Cell | None:
    """Return some of the rows of a cell; None if a class has too few people."""
    labels, persons, weights = scores.labels[rows], scores.persons[rows], scores.weights[rows]
    for label in (False, True):
        if (
            not (labels == label).any()
            or effective_people(persons[labels == label], weights[labels == label]) < MIN_PEOPLE
        ):
            return None
    return Cell(change[:, rows], labels, persons, weights, scores.n_folds)
