"""Partition people into cross-validation folds, stratified by the labels.

    plan = FoldPlan.build(labels, groups, weights=None, n_folds=5, n_repeats=5, seed=0)
    plan.held_out                               # bool [splits, rows]

A split never separates a person's rows, so a label that is random by person scores 1/2 (compare the control task of
Hewitt & Liang 2019, arXiv 1909.03368). A person may be any group of rows, such as a document.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.probing.uncertainty import effective_people

MIN_EFFECTIVE_GROUPS = 6  # effective number (Kish); the intervals are validated down to this number
MIN_EFFECTIVE_GROUPS_IN_CLASS = 2

MAX_FOLDS = 127  # fold numbers are stored as int8


@dataclass(frozen=True)
class Skipped:
    """The reason why a target was not measured, with its sample sizes."""

    reason: str
    n_rows: int
    n_people: int  # or other groups of rows
    n_people_effective: float  # number of groups of equal size with the same information (Kish)
    n_pos: int  # rows with a positive label


@dataclass(frozen=True)
class FoldPlan:
    """R partitions of the rows into K folds, shared by all targets and views of a task set.

    Partitions are stratified by the labels of all targets at once, so that all targets use the same training
    matrices. Targets that cannot be measured are in `skipped`, not in `labels`.
    """

    labels: NDArray[np.bool_]  # [kept targets, rows]
    kept: tuple[int, ...]  # indices of the kept targets among all targets
    skipped: Mapping[int, Skipped]  # by index among all targets
    groups: NDArray[np.int64]  # [rows], person ids
    weights: NDArray[np.float64]  # [rows]
    folds: NDArray[np.int8]  # [repeats, rows], the fold that holds the row out
    n_folds: int

    @classmethod
    def build(
        cls, labels: ArrayLike, groups: ArrayLike, weights: ArrayLike | None, n_folds: int, n_repeats: int, seed: int
    ) -> FoldPlan:
        """Build the plan; the same seed gives the same plan.

        Args:
            labels: bool [targets, rows].
            groups: int [rows], person ids.
            weights: [rows]; None: 1 each.
            n_folds: Folds of each partition.
            n_repeats: Number of partitions.
            seed: Seed of the partitions.

        Raises:
            ValueError: The shapes do not fit.
            RequestError: There are fewer than 2 or too many folds, or no repeat.
        """
        targets = np.asarray(labels, dtype=bool)
        people = np.asarray(groups, dtype=np.int64)
        weight = np.ones(len(people)) if weights is None else np.asarray(weights, dtype=np.float64)
        if targets.ndim != 2 or targets.shape[1:] != people.shape or weight.shape != people.shape:
            raise ValueError(f"labels {targets.shape} do not fit groups {people.shape} and weights {weight.shape}")
        if not 2 <= n_folds <= MAX_FOLDS or n_repeats < 1:
            raise RequestError(
                f"`folds` {n_folds}, `repeats` {n_repeats}: folds must be 2 to {MAX_FOLDS}, and repeats at least 1"
            )
        reasons = {t: reason_to_skip(row, people, n_folds, weight) for t, row in enumerate(targets)}
        skipped = {t: reason for t, reason in reasons.items() if reason is not None}
        kept = tuple(t for t in range(len(targets)) if t not in skipped)
        folds = np.zeros((n_repeats, len(people)), dtype=np.int8)
        if kept:
            seeds = np.random.SeedSequence(seed).generate_state(n_repeats)
            folds = np.stack([grouped_stratified_folds(targets[list(kept)], people, n_folds, int(s)) for s in seeds])
        return cls(targets[list(kept)], kept, skipped, people, weight, folds, n_folds)

    @property
    def n_repeats(self) -> int:
        return len(self.folds)

    @property
    def held_out(self) -> NDArray[np.bool_]:
        """[splits, rows]; split = repeat * n_folds + fold."""
        return (self.folds[:, None] == np.arange(self.n_folds)[:, None]).reshape(-1, self.folds.shape[1])

    def training_weight(self, device: torch.device) -> Tensor:
        """Return the training weights: float64 [splits, rows], 0 where held out."""
        return torch.from_numpy(np.where(self.held_out, 0.0, self.weights)).to(device)


def reason_to_skip(
    labels: NDArray[np.bool_], groups: NDArray[np.int64], n_folds: int, weights: NDArray[np.float64] | None = None
) -> Skipped | None:
    """Return why a target cannot be measured with this number of folds; None if it can."""
    weights = np.ones(len(groups)) if weights is None else weights
    sides = {"positive": labels, "negative": ~labels}
    people = {name: len(np.unique(groups[rows])) for name, rows in sides.items()}
    rarer = min(people, key=lambda name: people[name])
    effective = effective_people(groups, weights) if len(groups) else 0.0
    reason = None
    if people[rarer] < n_folds:
        groups_word = "group" if people[rarer] == 1 else "groups"
        reason = f"the {rarer} class has {people[rarer]} {groups_word}, fewer than the {n_folds} folds"
    elif effective < MIN_EFFECTIVE_GROUPS:
        reason = (
            f"{len(np.unique(groups))} groups of such unequal size that they are equivalent to only "
            f"{effective:.2g} of equal size; {MIN_EFFECTIVE_GROUPS} are needed"
        )
    else:
        by_class = {name: effective_people(groups[rows], weights[rows]) for name, rows in sides.items()}
        least = min(by_class, key=lambda name: by_class[name])
        if by_class[least] < MIN_EFFECTIVE_GROUPS_IN_CLASS:
            reason = (
                f"one group has most rows of the {least} class: its {people[least]} groups are equivalent to only "
                f"{by_class[least]:.2g} of equal size; {MIN_EFFECTIVE_GROUPS_IN_CLASS} are needed"
            )
    if reason is None:
        return None
    return Skipped(reason, len(labels), len(np.unique(groups)), effective, int(labels.sum()))


def grouped_stratified_folds(labels: ArrayLike, groups: ArrayLike, n_folds: int, seed: int) -> NDArray[np.int8]:
    """Assign rows to folds `[rows]`: no group is in two folds, and folds have similar sizes and class counts.

    labels: bool [rows] or [targets, rows]. Groups with the same counts of rows and positives are interchangeable, so
    they are distributed evenly at random. The few that remain are assigned one by one, the largest first (by powers of
    2, in random order within each), each to the fold that has least of what the group adds. Deterministic by seed.
    """
    random = np.random.default_rng(seed)
    _, person = np.unique(np.asarray(groups), return_inverse=True)
    targets = np.atleast_2d(np.asarray(labels, dtype=bool))
    positives = [np.bincount(person, weights=row) for row in targets]
    counts = np.stack([np.bincount(person), *positives], axis=1)  # [persons, 1 + targets]: rows first
    _, kind = np.unique(counts, axis=0, return_inverse=True)
    shuffled = random.permutation(len(counts))
    by_kind = shuffled[np.argsort(kind.ravel()[shuffled], kind="stable")]
    n_of_kind = np.bincount(kind.ravel())
    place = np.arange(len(counts)) - np.repeat(np.cumsum(n_of_kind) - n_of_kind, n_of_kind)
    even = place < np.repeat(n_of_kind - n_of_kind % n_folds, n_of_kind)
    fold = np.empty(len(counts), dtype=np.int8)
    fold[by_kind[even]] = place[even] % n_folds
    remaining = random.permutation(by_kind[~even])
    remaining = remaining[np.argsort(-np.floor(np.log2(counts[remaining, 0])), kind="stable")]
    _assign_greedily(fold, remaining, counts, random.permutation(n_folds))
    return fold[person]


def _assign_greedily(
    fold: NDArray[np.int8], remaining: NDArray[np.intp], counts: NDArray[np.float64], order: NDArray[np.intp]
) -> None:
    """Assign each remaining person to the fold where the squared shares of rows and classes grow least.

    Ties are broken by `order` [folds]. The folds are written into `fold` [persons].
    """
    cells = np.concatenate([counts, counts[:, :1] - counts[:, 1:]], axis=1)  # rows, positives, negatives
    cells /= np.maximum(cells.sum(axis=0), 1)
    filled = np.zeros((len(order), cells.shape[1]))
    for person in remaining:
        least = int(np.argmin(filled @ cells[person]))
        filled[least] += cells[person]
        fold[person] = order[least]


def control_plan(
    token_types: ArrayLike, rows: ArrayLike, weights: ArrayLike | None, n_folds: int, seed: int
) -> FoldPlan | None:
    """Return the control task of Hewitt & Liang 2019: a random label for each token type `[rows]`, split by row.

    A probe that scores well on it has memorised the tokens. `rows`, int [rows], identifies the rows, so that the folds
    do not depend on their order. None if there are too few types or rows for the folds.
    """
    types, kind = np.unique(np.asarray(token_types), return_inverse=True)
    coin = np.random.default_rng(seed).permutation(len(types)) % 2 == 0
    plan = FoldPlan.build(coin[kind][None], rows, weights, n_folds, 1, seed)
    return plan if plan.kept else None
