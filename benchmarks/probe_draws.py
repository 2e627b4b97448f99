"""Draw probed rows: the sample of people that one run of a benchmark sees.

pool = Pool.load()
pool.program_draw(3000, seed=1)      # the rows of `--shuffle_select_n 3000 --seed 1`, without replacement
pool.bootstrap(3000, seed=1)         # as many rows, of people drawn with replacement, with fresh folds
pool.halves(800, seed=1)             # at most 800 rows a task, twice: of either half of the people
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.probing.folds import FoldPlan
from delta_selectivity.tasks import Probe, ProbeTexts, load_probe_texts

N_FOLDS, N_REPEATS = 5, 5
ENOUGH = 5  # draws per available person


@dataclass(frozen=True)
class Task:
    """Probes on the same rows, with their folds."""

    names: tuple[str, ...]
    rows: NDArray[np.int64]  # indices into the pool's mentions; a person who is drawn twice has their rows twice
    plan: FoldPlan


@dataclass(frozen=True)
class Pool:
    """Mentions of the Wikidata tasks: all, or those of one draw."""

    texts: ProbeTexts

    @classmethod
    def load(cls, rows_per_dataset: int | None = None) -> Pool:
        """Load all mentions, or those that `program_draw` selects with seed 0."""
        return cls(load_probe_texts(None, shuffle_select_n=rows_per_dataset, seed=0))

    def program_draw(self, rows_per_dataset: int, seed: int, fold_seed: int) -> list[Task]:
        """Return the rows that `--shuffle_select_n` draws, with balanced classes."""
        place = {mention.identity: i for i, mention in enumerate(self.texts.mentions)}
        drawn = load_probe_texts(None, shuffle_select_n=rows_per_dataset, seed=seed)
        of_pool = np.array([place[mention.identity] for mention in drawn.mentions])
        return [self._task(names, of_pool[mentions], labels, fold_seed) for names, mentions, labels in _row_sets(drawn)]

    def bootstrap(self, rows_per_dataset: int, seed: int) -> list[Task]:
        """Draw people with replacement, each with all their rows, until there are as many rows as the program draws.

        The pool stands for the population: runs without replacement would share most of their rows and agree for that
        reason. The same people are drawn in all tasks in which they occur.
        """
        drawn = load_probe_texts(None, shuffle_select_n=rows_per_dataset, seed=seed)
        sizes = [len(mentions) for _, mentions, _ in _row_sets(drawn)]
        turns = draw_people(self.texts.persons, np.random.default_rng(seed))
        tasks = []
        for size, (names, mentions, labels) in zip(sizes, _row_sets(self.texts), strict=True):
            chosen = rows_of_people(turns, self.texts.persons[mentions], size)
            tasks.append(self._task(names, mentions[chosen], labels[:, chosen], seed))
        return tasks

    def halves(self, rows_per_task: int, seed: int) -> tuple[list[Task], list[Task]]:
        """Split the people into two halves at random; each task has at most so many rows of each half's people."""
        people = np.random.default_rng(seed).permutation(np.unique(self.texts.persons))
        middle = len(people) // 2
        first, second = (self._tasks_of(part, rows_per_task, seed) for part in (people[:middle], people[middle:]))
        return first, second

    def _tasks_of(self, people: NDArray[np.int64], rows_per_task: int, fold_seed: int) -> list[Task]:
        tasks = []
        for names, mentions, labels in _row_sets(self.texts):
            persons = self.texts.persons[mentions]
            n_rows = min(rows_per_task, int(np.isin(persons, people).sum()))
            chosen = rows_of_people(people, persons, n_rows)
            tasks.append(self._task(names, mentions[chosen], labels[:, chosen], fold_seed))
        return tasks

    def _task(self, names: tuple[str, ...], rows: NDArray[np.int64], labels: NDArray[np.bool_], fold_seed: int) -> Task:
        plan = FoldPlan.build(labels, self.texts.persons[rows], None, N_FOLDS, N_REPEATS, fold_seed)
        return Task(names, rows, plan)


def draw_people(persons: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
    """Return people drawn with replacement, one after the other; always more than are needed."""
    people = np.unique(persons)
    return random.choice(people, size=ENOUGH * len(people))


def rows_of_people(turns: NDArray[np.int64], persons: NDArray[np.int64], n_rows: int) -> NDArray[np.int64]:
    """Return indices [n_rows] into persons [rows]: all rows of each drawn person in turn; the last are cut to fit.

    Raises ValueError if there are too few draws.
    """
    order = np.argsort(persons, kind="stable")
    people, starts = np.unique(persons[order], return_index=True)
    rows = np.split(order, starts[1:])
    place = np.minimum(np.searchsorted(people, turns), len(people) - 1)
    drawn = place[people[place] == turns]
    chosen = np.concatenate([rows[i] for i in drawn])[:n_rows]
    if len(chosen) < n_rows:
        raise ValueError(f"{len(turns)} turns gave {len(chosen)} of {n_rows} rows")
    return chosen


def _row_sets(texts: ProbeTexts) -> Iterator[tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.bool_]]]:
    """Return names, mentions [rows] and labels [probes, rows] of the probes that share their rows."""
    for dataset in texts.datasets:
        shared: dict[bytes, list[Probe]] = {}
        for probe in dataset.probes:
            shared.setdefault(probe.mentions.tobytes(), []).append(probe)
        for probes in shared.values():
            yield _names(probes), probes[0].mentions, np.stack([probe.labels for probe in probes])


def _names(probes: Sequence[Probe]) -> tuple[str, ...]:
    return tuple(probe.name for probe in probes)
