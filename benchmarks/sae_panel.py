"""Pairs of SAEs whose better one is known from how they were made."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from benchmarks.sae_families import TINY_PYTHIA, Recipe, Study, close_variants

SEEDS = (0, 1, 2)  # of the SAEs' training


@dataclass(frozen=True)
class Snapshot:
    """An SAE after some steps of its training."""

    recipe: Recipe
    step: int

    @property
    def name(self) -> str:
        return f"{self.recipe.name}_step{self.step}"

    @classmethod
    def trained(cls, recipe: Recipe) -> Snapshot:
        """Return the snapshot at the end of the training."""
        return cls(recipe, recipe.steps)


Pair = tuple[Snapshot, Snapshot]  # the worse one, the better one


@dataclass(frozen=True)
class PairSet:
    """Pairs of one kind."""

    kind: str  # "snapshots", "close variants", or "close variants, other seeds"
    family: str
    change: str  # what differs between the two SAEs
    pairs: tuple[Pair, ...]

    @property
    def names(self) -> list[tuple[str, str]]:
        return [(worse.name, better.name) for worse, better in self.pairs]


def snapshots_of(family: str, study: Study = TINY_PYTHIA) -> list[Snapshot]:
    """Return the snapshots, from the least trained to the most."""
    return [Snapshot(study.member(family, 0), step) for step in study.snapshots]


def pair_sets(study: Study = TINY_PYTHIA) -> list[PairSet]:
    """Return all pairs of a family's snapshots, and of close variants and originals, with equal and other seeds."""
    sets = [
        PairSet("snapshots", family, "training steps", tuple(itertools.combinations(snapshots_of(family, study), 2)))
        for family in study.families
    ]
    for family in study.families:
        by_seed = [close_variants(study.member(family, seed)) for seed in SEEDS]
        for change in by_seed[0]:
            worse, better = zip(*(variants[change] for variants in by_seed), strict=True)
            pairs = {(i, j): (Snapshot.trained(worse[i]), Snapshot.trained(better[j]))
                     for i, j in itertools.product(range(len(SEEDS)), repeat=2)}  # fmt: skip
            same = tuple(pair for (i, j), pair in pairs.items() if i == j)
            other = tuple(pair for (i, j), pair in pairs.items() if i != j)
            sets.append(PairSet("close variants", family, change, same))
            sets.append(PairSet("close variants, other seeds", family, change, other))
    return sets


def panel(study: Study = TINY_PYTHIA) -> list[Snapshot]:
    """Return every SAE of any pair, once."""
    found = {snapshot.name: snapshot for each in pair_sets(study) for pair in each.pairs for snapshot in pair}
    for family in study.families:  # with snapshots; the same recipes among the variants have none
        found |= {snapshot.name: snapshot for snapshot in snapshots_of(family, study)}
    return list(found.values())


def noise_panel(study: Study = TINY_PYTHIA) -> list[Snapshot]:
    """Return the SAEs that are measured repeatedly: the last snapshot of each family, and a middle one."""
    first, second = (snapshots_of(family, study) for family in study.families)
    return [first[-1], second[-1], first[-4]]
