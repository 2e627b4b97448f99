"""Types of task data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Mention:
    """One distinct text and its probed characters [start, end) (the person's name)."""

    text: str
    start: int
    end: int
    person: str  # key of the person or other group of rows, which a split never separates
    token_ids: tuple[int, ...] | None = None  # pre-tokenised data (Gurnee): the real tokens, without BOS
    token_span: tuple[int, int] | None = None  # inclusive positions of the name in token_ids

    @property
    def identity(self) -> tuple[object, ...]:
        """Return the model's input and the probed position: mentions with the same identity are equal."""
        return (self.text, self.start, self.end, self.token_ids, self.token_span)


@dataclass(frozen=True, eq=False)
class Probe:
    """One binary classification of a set of mentions."""

    name: str
    mentions: Int64Array  # [n] indices into ProbeTexts.mentions, each at most once
    labels: BoolArray  # [n]; both classes occur
    positive: str = "1"  # name of the class that True stands for, as in the source


@dataclass(frozen=True, eq=False)
class Dataset:
    """Probes that are reported in one file."""

    name: str  # 'gender'
    slug: str  # 'wikidata_gender': used in file names
    probes: tuple[Probe, ...]
    is_public: bool = False  # whether its texts are public
    family: str | None = None  # the tasks with the same kind of question; None: a user's task
    source: str | None = None  # source of its texts, which other tasks may share


@dataclass(frozen=True, eq=False)
class ProbeTexts:
    """All texts to run through the model, and all probes to fit on them."""

    mentions: tuple[Mention, ...]  # distinct by identity and person, over all datasets
    persons: Int64Array  # [n_mentions] person ids, equal for equal keys in all datasets and runs
    datasets: tuple[Dataset, ...]


@dataclass(frozen=True)
class Row:
    """One row of a source, unmodified."""

    mention: Mention
    value: str  # the class, as in the source


@dataclass(frozen=True)
class ProbeSpec:
    """A probe as defined by a source: rows whose value is `positive` against all others."""

    name: str
    positive: str


@dataclass(frozen=True)
class RowSet:
    """Rows and the probes that share them."""

    rows: tuple[Row, ...]
    probes: tuple[ProbeSpec, ...]

    @property
    def name(self) -> str:
        """Return the probes' names, which are unique within a source."""
        return "+".join(probe.name for probe in self.probes)


@dataclass(frozen=True)
class Task:
    """A loaded task: all rows and probes, before deduplication and sampling. It has its own result file."""

    name: str
    slug: str
    row_sets: tuple[RowSet, ...]
    is_public: bool = False  # whether its texts are public; a user's table may be confidential
    family: str | None = None  # of tasks with the same kind of question; None: a user's task
    source: str | None = None  # source of its texts, which other tasks may share
    grouping: str | None = None  # how `Mention.person` was determined; None: from the user's table

    def __repr__(self) -> str:
        probes = [probe.name for row_set in self.row_sets for probe in row_set.probes]
        return f"<Task {self.name}: {sum(len(row_set.rows) for row_set in self.row_sets)} rows, {', '.join(probes)}>"
