"""Types of task data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Mention:
    """One distinct text and the characters [start, end) of it that are probed (the person's name)."""

    text: str
    start: int
    end: int
    person: str  # key of the person, or of whatever else groups rows: a key never falls on both sides of a split
    token_ids: tuple[int, ...] | None = None  # pre-tokenised data (Gurnee): the real tokens, without BOS
    token_span: tuple[int, int] | None = None  # inclusive positions of the name in token_ids

    @property
    def identity(self) -> tuple[object, ...]:
        """What the model is shown and where it is probed: two mentions that share it are one."""
        return (self.text, self.start, self.end, self.token_ids, self.token_span)


@dataclass(frozen=True, eq=False)
class Probe:
    """One binary question about a set of mentions."""

    name: str
    mentions: Int64Array  # [n] indices into ProbeTexts.mentions, each at most once
    labels: BoolArray  # [n]; both classes occur
    positive: str = "1"  # the class that True stands for, as the source spells it


@dataclass(frozen=True, eq=False)
class Dataset:
    """Probes that are reported in one file."""

    name: str  # 'gender'
    slug: str  # 'wikidata_gender': the file name's part
    probes: tuple[Probe, ...]
    is_public: bool = False  # whether anybody may read its texts
    family: str | None = None  # of tasks that ask for the same kind of thing; None: a task of the user's
    source: str | None = None  # what its texts are drawn from, if other tasks may share it


@dataclass(frozen=True, eq=False)
class ProbeTexts:
    """Everything to run through the model once, and every question to ask about it."""

    mentions: tuple[Mention, ...]  # each identity and person once over all datasets
    persons: Int64Array  # [n_mentions] person id: one key, one id, across datasets and runs
    datasets: tuple[Dataset, ...]


@dataclass(frozen=True)
class Row:
    """One row of a source, as shipped."""

    mention: Mention
    value: str  # the class as the source spells it


@dataclass(frozen=True)
class ProbeSpec:
    """A probe as a source defines it: rows whose value is `positive` against all others."""

    name: str
    positive: str


@dataclass(frozen=True)
class RowSet:
    """Rows and the probes that share them."""

    rows: tuple[Row, ...]
    probes: tuple[ProbeSpec, ...]

    @property
    def name(self) -> str:
        """The probes' names: unique within a source."""
        return "+".join(probe.name for probe in self.probes)


@dataclass(frozen=True)
class Task:
    """A task as read: its rows and its probes, before duplicates are dropped and rows drawn. One result file each."""

    name: str
    slug: str
    row_sets: tuple[RowSet, ...]
    is_public: bool = False  # whether anybody may read its texts; a user's table may hold what nobody else should see
    family: str | None = None  # of tasks that ask for the same kind of thing; None: a task of the user's
    source: str | None = None  # what its texts are drawn from, if other tasks may share it
    grouping: str | None = None  # how `Mention.person` was found, in a word; None: as the user's table says

    def __repr__(self) -> str:
        probes = [probe.name for row_set in self.row_sets for probe in row_set.probes]
        return f"<Task {self.name}: {sum(len(row_set.rows) for row_set in self.row_sets)} rows, {', '.join(probes)}>"
