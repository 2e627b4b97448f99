"""What a probe's split into folds is worth: the same probes on rows as shipped, on distinct texts, folded by person.

python benchmarks/leakage.py run              # measure on the bundled model (minutes)
python benchmarks/leakage.py run --layer 5    # at another layer
python benchmarks/leakage.py                  # the table, from what `run` kept

The field's recipe splits rows at random. Where texts repeat, and where a person is named in several, part of the
test rows are then known from training (Kaufman et al. 2012, doi 10.1145/2382577.2382579, call it leakage).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from delta_selectivity.probing.folds import FoldPlan
from delta_selectivity.probing.probes import ProbeBackend, choose_backend
from delta_selectivity.probing.selectivity import fit_model
from delta_selectivity.probing.uncertainty import Estimate, estimate_delta
from delta_selectivity.records import result_file
from delta_selectivity.reporting import tables
from delta_selectivity.tasks.assemble import distinct_rows
from delta_selectivity.tasks.catalogue import load_tasks
from delta_selectivity.tasks.types import RowSet

PROJECT = Path(__file__).resolve().parent.parent

KEPT = Path(__file__).resolve().with_suffix("")  # folder beside this file
DEFAULT_LAYER = 4  # of 0 to 5
N_FOLDS, N_REPEATS, SEED = 5, 5, 0


@dataclass(frozen=True)
class Figure:
    """A balanced accuracy, or a difference of two, with its 95 % interval, clustered by person."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, estimate: Estimate) -> Figure:
        return cls(estimate.value, estimate.low, estimate.high)


@dataclass(frozen=True)
class Leakage:
    """One probe's balanced accuracy under three splits."""

    probe: str
    n_shipped: int  # rows with their duplicates
    n_distinct: int
    n_people: int  # in the distinct rows
    shipped: Figure  # rows as shipped, folds by row
    distinct: Figure  # distinct texts, folds by row
    by_person: Figure  # distinct texts, folds by person
    persons_share: Figure  # distinct - by_person, paired row by row: what the same people on both sides are worth
    row_standard_error: float  # of by_person, if its rows are taken for independent: too small
    person_standard_error: float  # of by_person


@dataclass(frozen=True)
class Rows:
    """Rows with the questions asked about them."""

    x: Tensor  # [rows, d]
    labels: NDArray[np.bool_]  # [probes, rows]
    persons: NDArray[np.int64]  # [rows]


def correct_by_fold(rows: Rows, groups: NDArray[np.int64], backend: ProbeBackend) -> NDArray[np.bool_]:
    """Whether each row is told right by probes that have not seen its group: [probes, repeats, rows].

    Raises ValueError if a probe has fewer groups of a class than folds.
    """
    plan = FoldPlan.build(rows.labels, groups, None, N_FOLDS, N_REPEATS, SEED)
    if plan.skipped:
        raise ValueError("; ".join(skipped.reason for skipped in plan.skipped.values()))
    return (fit_model(plan, rows.x, backend).fit.scores.cpu().numpy() > 0) == rows.labels[:, None]


def compare(probes: Sequence[str], shipped: Rows, distinct: Rows, backend: ProbeBackend) -> list[Leakage]:
    """The three splits of each probe. Rows of one person count as one for every interval, whatever the folds."""
    each = np.arange
    as_shipped = correct_by_fold(shipped, each(len(shipped.persons)), backend)
    by_row = correct_by_fold(distinct, each(len(distinct.persons)), backend)
    by_person = correct_by_fold(distinct, distinct.persons, backend)
    found = []
    for t, probe in enumerate(probes):
        labels, persons = distinct.labels[t], distinct.persons
        honest = estimate_delta(by_person[t], labels, persons)
        gain = by_row[t].astype(np.float64) - by_person[t]
        found.append(
            Leakage(
                probe=probe,
                n_shipped=len(shipped.persons),
                n_distinct=len(persons),
                n_people=len(np.unique(persons)),
                shipped=Figure.of(estimate_delta(as_shipped[t], shipped.labels[t], shipped.persons)),
                distinct=Figure.of(estimate_delta(by_row[t], labels, persons)),
                by_person=Figure.of(honest),
                persons_share=Figure.of(estimate_delta(gain, labels, persons)),
                row_standard_error=estimate_delta(by_person[t], labels, each(len(persons))).standard_error,
                person_standard_error=honest.standard_error,
            )
        )
    return found


def measure(layer: int) -> list[Leakage]:
    """Every probe of every Wikidata task on the bundled model."""
    from benchmarks.bundled import activations

    pairs = [
        pair for source in load_tasks() for pair in zip(source.row_sets, distinct_rows(source).row_sets, strict=True)
    ]
    places = {row.mention: 0 for shipped, _ in pairs for row in shipped.rows}  # each distinct mention is run once
    places = {mention: place for place, mention in enumerate(places)}
    people = {key: i for i, key in enumerate(sorted({mention.person for mention in places}))}
    x = activations(list(places), [layer])[layer]
    backend, _ = choose_backend("torch", "cpu")

    def rows(row_set: RowSet) -> Rows:
        mentions = [row.mention for row in row_set.rows]
        labels = [[row.value == probe.positive for row in row_set.rows] for probe in row_set.probes]
        persons = np.array([people[mention.person] for mention in mentions], dtype=np.int64)
        return Rows(x[[places[mention] for mention in mentions]], np.array(labels), persons)

    return [
        leakage
        for shipped, distinct in pairs
        for leakage in compare([p.name for p in shipped.probes], rows(shipped), rows(distinct), backend)
    ]


def run(layer: int) -> None:
    """Measure, and keep the figures."""
    found = measure(layer)
    config = {"layer": layer, "folds": N_FOLDS, "repeats": N_REPEATS, "seed": SEED}
    KEPT.mkdir(exist_ok=True)
    content = {"probes": [asdict(leakage) for leakage in found], "_run": result_file.describe_run(config)}
    result_file.write_json(kept_file(layer), content)


def kept_file(layer: int) -> Path:
    return KEPT / f"layer_{layer}.json"


def table(layer: int) -> str:
    """A line per probe, and what the table says in a sentence or two."""
    kept = json.loads(kept_file(layer).read_text(encoding="utf-8"))["probes"]
    rows: list[tables.Row] = [
        ("probe", "people", "rows as shipped", "distinct", "as shipped, by row", "distinct, by row",
         "distinct, by person", "95 % interval", "by row - by person", "95 % interval")
    ]  # fmt: skip
    for probe in kept:
        rows.append(
            (
                probe["probe"],
                *(str(probe[name]) for name in ("n_people", "n_shipped", "n_distinct")),
                *(f"{probe[split]['value']:.3f}" for split in ("shipped", "distinct", "by_person")),
                _interval(probe["by_person"], ".3f"),
                f"{probe['persons_share']['value']:+.3f}",
                _interval(probe["persons_share"], "+.3f"),
            )
        )
    return f"{tables.aligned(rows)}\n\n{_verdict(kept)}"


def _interval(figure: dict[str, float], form: str) -> str:
    return f"{figure['low']:{form}} .. {figure['high']:{form}}"


def _verdict(kept: Sequence[result_file.Json]) -> str:
    shipped = [probe["shipped"]["value"] - probe["by_person"]["value"] for probe in kept]
    worst = kept[int(np.argmax(shipped))]["probe"]
    shared = sum(probe["persons_share"]["low"] > 0 for probe in kept)
    narrow = [1 - probe["row_standard_error"] / probe["person_standard_error"] for probe in kept]
    return (
        f"Rows as shipped, split by row, flatter by {np.mean(shipped):.3f} on average, by {max(shipped):.3f} at most "
        f"({worst}). With the duplicates gone, people on both sides still flatter {shared} of {len(kept)} probes "
        f"(interval above 0). Standard errors that take rows for independent are too small, by {np.mean(narrow):.0%} "
        f"on average and {max(narrow):.0%} at most; the intervals here are clustered by person."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run"], help="measure first")
    parser.add_argument("--layer", type=int, default=DEFAULT_LAYER, help="of the bundled model (%(default)s)")
    asked = parser.parse_args()
    if asked.what == "run":
        run(asked.layer)
    print(table(asked.layer))
