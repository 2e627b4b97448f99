"""Draws of probed rows: what one run of a benchmark sees of the people that there are.

pool = Pool.load()
pool.program_draw(3000, seed=1)      # what `--shuffle_select_n 3000 --seed 1` takes, without replacement
pool.bootstrap(3000, seed=1)         # as many rows of people drawn with replacement, fresh folds
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datasets_wikidata import Probe, ProbeTexts, load_probe_texts
from selectivity import FoldPlan

N_FOLDS, N_REPEATS = 5, 5


@dataclass(frozen=True)
class Task:
    """Probes on the same rows, with their folds."""

    names: tuple[str, ...]
    rows: NDArray[np.int64]  # indices into the pool's mentions; a person drawn twice has its rows twice
    plan: FoldPlan


@dataclass(frozen=True)
class Pool:
    """Every mention of the Wikidata tasks."""

    texts: ProbeTexts

    @classmethod
    def load(cls) -> Pool:
        return cls(load_probe_texts(None))

    def program_draw(self, rows_per_dataset: int, seed: int, fold_seed: int) -> list[Task]:
        """The rows that `--shuffle_select_n` draws, classes balanced."""
        place = {mention.identity: i for i, mention in enumerate(self.texts.mentions)}
        drawn = load_probe_texts(None, shuffle_select_n=rows_per_dataset, seed=seed)
        of_pool = np.array([place[mention.identity] for mention in drawn.mentions])
        return [self._task(names, of_pool[mentions], labels, fold_seed) for names, mentions, labels in _row_sets(drawn)]

    def bootstrap(self, rows_per_dataset: int, seed: int) -> list[Task]:
        """People drawn with replacement, each with all its rows, until there are as many rows as the program draws.

        The pool stands for the population: runs without replacement would share most of their rows, and agree for it.
        """
        drawn = load_probe_texts(None, shuffle_select_n=rows_per_dataset, seed=seed)
        sizes = [len(mentions) for _, mentions, _ in _row_sets(drawn)]
        random = np.random.default_rng(seed)
        tasks = []
        for size, (names, mentions, labels) in zip(sizes, _row_sets(self.texts), strict=True):
            chosen = resampled_people(self.texts.persons[mentions], size, random)
            tasks.append(self._task(names, mentions[chosen], labels[:, chosen], seed))
        return tasks

    def _task(self, names: tuple[str, ...], rows: NDArray[np.int64], labels: NDArray[np.bool_], fold_seed: int) -> Task:
        plan = FoldPlan.build(labels, self.texts.persons[rows], None, N_FOLDS, N_REPEATS, fold_seed)
        return Task(names, rows, plan)


def resampled_people(persons: NDArray[np.int64], n_rows: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Indices [n_rows] into persons [rows]: all rows of people drawn with replacement, the last one's cut to fit."""
    order = np.argsort(persons, kind="stable")
    starts = np.flatnonzero(np.diff(persons[order], prepend=-1))
    groups = np.split(order, starts[1:])
    drawn = random.integers(len(groups), size=n_rows)  # a person has at least one row
    return np.concatenate([groups[i] for i in drawn])[:n_rows]


def _row_sets(texts: ProbeTexts) -> Iterator[tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.bool_]]]:
    """Names, mentions [rows] and labels [probes, rows] of the probes that share their rows."""
    for dataset in texts.datasets:
        shared: dict[bytes, list[Probe]] = {}
        for probe in dataset.probes:
            shared.setdefault(probe.mentions.tobytes(), []).append(probe)
        for probes in shared.values():
            yield _names(probes), probes[0].mentions, np.stack([probe.labels for probe in probes])


def _names(probes: Sequence[Probe]) -> tuple[str, ...]:
    return tuple(probe.name for probe in probes)
