"""Drop duplicates, sample rows, and index each distinct mention of several tasks once.

A third of the Wikidata rows are exact duplicates, and 4529 of the distinct prompts are in several files. A duplicate on
both sides of a split inflates the score of every probe, and running it twice wastes a forward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from delta_selectivity.errors import RequestError
from delta_selectivity.system.person_ids import person_ids
from delta_selectivity.tasks.selection import select_rows
from delta_selectivity.tasks.types import (
    BoolArray,
    Dataset,
    Mention,
    Probe,
    ProbeTexts,
    Row,
    RowSet,
    Task,
)

logger = logging.getLogger(__name__)


def assemble(sources: Iterable[Task], shuffle_select_n: int | None, seed: int, several: bool = False) -> ProbeTexts:
    """Deduplicate, sample and index `sources`.

    Raises `RequestError` if a probe is left with one class, or `shuffle_select_n` is too small for two. If there are
    `several` tasks, such probes are kept, and their results have a reason instead of numbers.
    """
    index = _MentionIndex()
    datasets = []
    for source in sources:
        allow_one_class = several and len(source.row_sets) == 1
        drawn = select_rows(distinct_rows(source, allow_one_class), shuffle_select_n, seed, allow_one_class)
        probes = tuple(probe for row_set in drawn.row_sets for probe in _probes(row_set, index))
        datasets.append(Dataset(drawn.name, drawn.slug, probes, drawn.is_public, drawn.family, drawn.source))
    return ProbeTexts(tuple(index.mentions), person_ids(mention.person for mention in index.mentions), tuple(datasets))


def distinct_rows(source: Task, allow_one_class: bool = False) -> Task:
    """Return the task with every mention once per row set; a mention with two labels is dropped.

    Raises `RequestError` if a probe is left with one class or, with `allow_one_class`, if no row is left.
    """
    row_sets = tuple(_distinct(row_set, source.slug, allow_one_class) for row_set in source.row_sets)
    return replace(source, row_sets=row_sets)


def _distinct(row_set: RowSet, slug: str, allow_one_class: bool) -> RowSet:
    first, conflicting = first_rows(row_set)
    rows = tuple(row for identity, row in first.items() if identity not in conflicting)
    if conflicting:
        logger.warning("%s, %s: dropped %d texts with two labels", slug, row_set.name, len(conflicting))
    if not (allow_one_class and rows):
        _require_two_classes(rows, row_set, slug)
    return RowSet(rows, row_set.probes)


def first_rows(row_set: RowSet) -> tuple[dict[tuple[object, ...], Row], set[tuple[object, ...]]]:
    """Return the first row of each mention, by identity, and the identities of mentions with two labels."""
    first: dict[tuple[object, ...], Row] = {}
    conflicting: set[tuple[object, ...]] = set()
    for row in row_set.rows:
        kept = first.setdefault(row.mention.identity, row)
        if kept.value != row.value:
            conflicting.add(row.mention.identity)
    return first, conflicting


def _require_two_classes(rows: Sequence[Row], row_set: RowSet, slug: str) -> None:
    for probe in row_set.probes:
        positives = sum(row.value == probe.positive for row in rows)
        if positives in (0, len(rows)):
            raise RequestError(
                f"{slug}: probe {probe.name!r} has {positives} positives in {len(rows)} distinct rows: "
                "a probe needs rows of both classes"
            )


def _probes(row_set: RowSet, index: _MentionIndex) -> list[Probe]:
    mentions = np.array([index.add(row.mention) for row in row_set.rows], dtype=np.int64)

    def labels(positive: str) -> BoolArray:  # compared in Python: NumPy drops a string's trailing NUL
        return np.array([row.value == positive for row in row_set.rows], dtype=np.bool_)

    return [Probe(spec.name, mentions, labels(spec.positive), spec.positive) for spec in row_set.probes]


class _MentionIndex:
    """Index of distinct mentions in order of first appearance; a mention has one entry for each of its groups."""

    def __init__(self) -> None:
        self.mentions: list[Mention] = []
        self._positions: dict[tuple[object, ...], int] = {}

    def add(self, mention: Mention) -> int:
        """Return the index of `mention`, adding it if it is new."""
        position = self._positions.setdefault((*mention.identity, mention.person), len(self.mentions))
        if position == len(self.mentions):
            self.mentions.append(mention)
        return position
