"""Measure the effect of the split into folds: rows as shipped, distinct texts, and folds grouped by person.

python -m benchmarks.leakage run              # measure on the bundled model (minutes)
python -m benchmarks.leakage run --layer 5    # at another layer
python -m benchmarks.leakage                  # print the table of the kept results
python -m benchmarks.leakage run --suite      # the 113 tasks of sae-probes, and the two bundled SAEs on each split
python -m benchmarks.leakage run --suite --model_name smollm2-135m    # a third of them on a real model: an hour

Common practice splits rows at random. If texts repeat, or a person is named in several texts, part of the test rows is
then known from training: leakage (Kaufman et al. 2012, doi 10.1145/2382577.2382579).

Of the tasks of sae-probes, whole groups are drawn, with all copies of their texts, until there are `TEXTS` distinct
texts. Longer ones than `MAX_TOKENS`, the context of the bundled model, keep their end on either model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import bundled
from delta_selectivity.probing.folds import FoldPlan
from delta_selectivity.probing.probes import ProbeBackend, choose_backend
from delta_selectivity.probing.selectivity import fit_model
from delta_selectivity.probing.uncertainty import Estimate, estimate_delta
from delta_selectivity.records import result_file
from delta_selectivity.reporting import tables
from delta_selectivity.tasks import DATASET_NAMES
from delta_selectivity.tasks.assemble import distinct_rows
from delta_selectivity.tasks.catalogue import read_tasks
from delta_selectivity.tasks.suite_files import FAMILIES, SUITE, family_of
from delta_selectivity.tasks.types import Mention, Row, RowSet

PROJECT = Path(__file__).resolve().parent.parent

KEPT = Path(__file__).resolve().with_suffix("")  # folder beside this file
N_FOLDS, N_REPEATS, SEED = 5, 5, 0
TEXTS = 500  # distinct texts of each sae-probes task
MAX_TOKENS = 512
SPLITS = ("shipped", "distinct", "by_person")


@dataclass(frozen=True)
class Measured:
    """A model, two of its SAEs, and the tasks of sae-probes to measure them on."""

    model: Path | str
    layer: int  # if none is asked for
    saes: tuple[str, str]  # folders of bundled SAEs
    tasks: Sequence[str]
    prefix: str  # of the names of kept files


MODELS = {
    "tiny-pythia": Measured(bundled.MODEL, 4, ("tiny-pythia-saes-k8", "tiny-pythia-saes-k32"), SUITE, ""),
    "smollm2-135m": Measured(
        "smollm2-135m", 15, ("smollm2-saes/topk-k32", "smollm2-saes/topk-k128"), SUITE[::3], "smollm2-135m_"
    ),
}


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
    """The balanced accuracy of one probe under three splits."""

    probe: str
    n_shipped: int  # rows, with duplicates
    n_distinct: int
    n_people: int  # people in the distinct rows
    shipped: Figure  # rows as shipped, folds by row
    distinct: Figure  # distinct texts, folds by row
    by_person: Figure  # distinct texts, folds by person
    persons_share: (
        Figure  # distinct - by_person, paired row by row: the effect of people who are in both training and test rows
    )
    row_standard_error: float  # standard error of by_person if rows are treated as independent: too small
    person_standard_error: float  # standard error of by_person


@dataclass(frozen=True)
class Rows:
    """Rows with the labels of several probes."""

    x: Tensor  # [rows, d]
    labels: NDArray[np.bool_]  # [probes, rows]
    persons: NDArray[np.int64]  # [rows]


def correct_by_fold(rows: Rows, groups: NDArray[np.int64], backend: ProbeBackend) -> NDArray[np.bool_]:
    """Return whether each row is classified correctly by probes trained without its group: [probes, repeats, rows].

    Raises ValueError if a probe has fewer groups of a class than folds.
    """
    plan = FoldPlan.build(rows.labels, groups, None, N_FOLDS, N_REPEATS, SEED)
    if plan.skipped:
        raise ValueError("; ".join(skipped.reason for skipped in plan.skipped.values()))
    return (fit_model(plan, rows.x, backend).fit.scores.cpu().numpy() > 0) == rows.labels[:, None]


def compare(probes: Sequence[str], shipped: Rows, distinct: Rows, backend: ProbeBackend) -> list[Leakage]:
    """Compare the three splits of each probe. All intervals are clustered by person, whatever the folds."""
    each = np.arange
    as_shipped = correct_by_fold(shipped, each(len(shipped.persons)), backend)
    by_row = correct_by_fold(distinct, each(len(distinct.persons)), backend)
    by_person = correct_by_fold(distinct, distinct.persons, backend)
    leakages = []
    for t, probe in enumerate(probes):
        labels, persons = distinct.labels[t], distinct.persons
        honest = estimate_delta(by_person[t], labels, persons)
        gain = by_row[t].astype(np.float64) - by_person[t]
        leakages.append(
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
    return leakages


@dataclass(frozen=True)
class Pair:
    """The rows of a task as shipped, and its distinct texts."""

    task: str
    shipped: RowSet
    distinct: RowSet


def read_pairs(tasks: Sequence[str], n_texts: int | None) -> Iterator[Pair]:
    """Read the row sets of tasks; n_texts: number of distinct texts of each, in whole groups."""
    for source in read_tasks(tasks):
        for shipped, distinct in zip(source.row_sets, distinct_rows(source).row_sets, strict=True):
            kept = distinct.rows if n_texts is None else draw_groups(distinct.rows, n_texts)
            of = {row.mention.identity for row in kept}
            rows = tuple(row for row in shipped.rows if row.mention.identity in of)
            yield Pair(source.name, RowSet(rows, shipped.probes), RowSet(tuple(kept), distinct.probes))


def draw_groups(rows: Sequence[Row], n: int) -> list[Row]:
    """Return all rows of randomly drawn groups, until there are n rows or no group is left."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.mention.person, []).append(row)
    names = sorted(groups)
    kept: list[Row] = []
    for place in np.random.default_rng(SEED).permutation(len(names)):
        kept += groups[names[place]] if len(kept) < n else []
    return kept


def places_of(pairs: Sequence[Pair]) -> dict[Mention, int]:
    """Return each distinct mention, and the row of its activations."""
    first_rows = {row.mention: 0 for pair in pairs for row in pair.shipped.rows}
    return {mention: place for place, mention in enumerate(first_rows)}


def rows_of(row_set: RowSet, x: Tensor, places: dict[Mention, int], people: dict[str, int]) -> Rows:
    mentions = [row.mention for row in row_set.rows]
    labels = [[row.value == probe.positive for row in row_set.rows] for probe in row_set.probes]
    persons = np.array([people[mention.person] for mention in mentions], dtype=np.int64)
    return Rows(x[[places[mention] for mention in mentions]], np.array(labels), persons)


def measure(layer: int) -> list[Leakage]:
    """Measure every probe of every Wikidata task on the bundled model."""
    pairs = list(read_pairs(DATASET_NAMES, None))
    places = places_of(pairs)
    people = {key: i for i, key in enumerate(sorted({mention.person for mention in places}))}
    x = bundled.activations(list(places), [layer])[layer]
    backend, _ = choose_backend("torch", "cpu")
    return [
        leakage
        for pair in pairs
        for leakage in compare(
            [p.name for p in pair.shipped.probes],
            rows_of(pair.shipped, x, places, people),
            rows_of(pair.distinct, x, places, people),
            backend,
        )
    ]


def measure_suite(measured: Measured, layer: int, n_texts: int = TEXTS) -> list[dict[str, object]]:
    """Measure the three splits of each task on the model's activations, and the difference between the two SAEs."""
    pairs = list(read_pairs(measured.tasks, n_texts))
    places = places_of(pairs)
    people = {key: i for i, key in enumerate(sorted({mention.person for mention in places}))}
    x = bundled.activations(list(places), [layer], measured.model, max_length=MAX_TOKENS)[layer]
    recons = {sae: bundled.reconstructions(x, sae, layer) for sae in measured.saes}
    backend, _ = choose_backend("torch", "cpu")
    lines = []
    for pair in pairs:
        shipped, distinct = (rows_of(rows, x, places, people) for rows in (pair.shipped, pair.distinct))
        about: dict[str, object] = {"task": pair.task, "family": family_of(pair.task)}
        try:
            (leakage,) = compare([pair.task], shipped, distinct, backend)
            one, other = (
                [rows_of(rows, recon, places, people) for rows in (pair.shipped, pair.distinct)]
                for recon in recons.values()
            )
            lines.append({**about, **asdict(leakage), **asdict(compare_saes(one, other, backend))})
        except ValueError as error:
            lines.append({**about, "reason": str(error)})
    return lines


@dataclass(frozen=True)
class SaeDifference:
    """The second SAE's balanced accuracy minus the first's, by the published method and by groups."""

    as_published: Figure  # rows as shipped, folds by row, one partition, rows treated as independent
    by_group: Figure  # distinct texts, folds by group, all partitions, clustered


def compare_saes(one: Sequence[Rows], other: Sequence[Rows], backend: ProbeBackend) -> SaeDifference:
    """Compare two SAEs; one, other: the rows of each SAE's reconstruction, as shipped and distinct."""
    each = np.arange(len(one[0].persons))
    shipped = [correct_by_fold(rows[0], each, backend)[0].astype(np.float64) for rows in (one, other)]
    grouped = [correct_by_fold(rows[1], rows[1].persons, backend)[0].astype(np.float64) for rows in (one, other)]
    return SaeDifference(
        Figure.of(estimate_delta((shipped[1] - shipped[0])[:1], one[0].labels[0], each)),
        Figure.of(estimate_delta(grouped[1] - grouped[0], one[1].labels[0], one[1].persons)),
    )


def run(measured: Measured, layer: int, suite: bool = False) -> None:
    """Measure, and keep the figures."""
    results = measure_suite(measured, layer) if suite else [asdict(leakage) for leakage in measure(layer)]
    config = {"layer": layer, "folds": N_FOLDS, "repeats": N_REPEATS, "seed": SEED}
    config |= {"texts": TEXTS} if suite else {}
    KEPT.mkdir(exist_ok=True)
    content = {"tasks" if suite else "probes": results, "_run": result_file.describe_run(config)}
    result_file.write_json(kept_file(measured, layer, suite), content)


def kept_file(measured: Measured, layer: int, suite: bool = False) -> Path:
    return KEPT / f"{measured.prefix}{'suite_' if suite else ''}layer_{layer}.json"


def suite_table(kept: Sequence[result_file.Json]) -> str:
    """Return a line per family of tasks, a line for each of the worst tasks, and a summary."""
    known = [task for task in kept if "reason" not in task]
    head = ("tasks", "rows as shipped", "distinct", "groups", "as shipped, by row", "distinct, by row",
            "distinct, by group", "flattery")  # fmt: skip
    families: list[tables.Row] = [("family", *head)]
    for family in (*FAMILIES, "all"):
        own = [task for task in known if family in (task["family"], "all")]
        if own:
            counts = (str(sum(task[name] for task in own)) for name in ("n_shipped", "n_distinct", "n_people"))
            families.append((family, str(len(own)), *counts, *_means(own)))
    worst = sorted(known, key=_overestimate, reverse=True)[:WORST]
    lines: list[tables.Row] = [("task", *head[1:])]
    for task in worst:
        counts = (str(task[name]) for name in ("n_shipped", "n_distinct", "n_people"))
        lines.append((task["task"], *counts, *_means([task])))
    reasons = [f"{task['task']}: {task['reason']}" for task in kept if "reason" in task]
    parts = [tables.aligned(families), tables.aligned(lines), _suite_verdict(known), *reasons]
    return "\n\n".join(parts)


WORST = 12  # number of tasks in the table


def _overestimate(task: result_file.Json) -> float:
    return float(task["shipped"]["value"] - task["by_person"]["value"])


def _means(tasks: Sequence[result_file.Json]) -> list[str]:
    means = [float(np.mean([task[split]["value"] for task in tasks])) for split in SPLITS]
    return [*(f"{mean:.3f}" for mean in means), f"{means[0] - means[2]:+.3f}"]


def _suite_verdict(known: Sequence[result_file.Json]) -> str:
    flattered = [_overestimate(task) for task in known]
    halves = sum(
        task["shipped"]["value"] - 0.5 > 2 * max(task["by_person"]["value"] - 0.5, 0) for task in known
    )  # fmt: skip
    sure = [task for task in known if task["as_published"]["low"] > 0 or task["as_published"]["high"] < 0]
    upheld = [task for task in sure if _agrees(task) and (task["by_group"]["low"] > 0 or task["by_group"]["high"] < 0)]
    turned = [task for task in known if task["as_published"]["value"] * task["by_group"]["value"] < 0]
    return (
        f"Rows as shipped, split by row, flatter {sum(gain > 0.01 for gain in flattered)} of {len(known)} tasks by "
        f"more than 0.01, {sum(gain > 0.05 for gain in flattered)} by more than 0.05; in {halves} more than half of "
        f"what is above chance is flattery. Compared as published (rows as shipped, one split, rows independent), "
        f"the two SAEs differ surely on {len(sure)} tasks; {len(upheld)} of these differ surely by group as well. On "
        f"{len(turned)} tasks the other SAE is ahead by group."
    )


def _agrees(task: result_file.Json) -> bool:
    return bool(task["as_published"]["value"] * task["by_group"]["value"] > 0)


def table(kept: Sequence[result_file.Json]) -> str:
    """Return a line per probe, and a summary."""
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
    parser.add_argument("--suite", action="store_true", help="the tasks of sae-probes, not the Wikidata tasks")
    parser.add_argument("--model_name", choices=MODELS, default="tiny-pythia", help="with --suite (%(default)s)")
    parser.add_argument("--layer", type=int, help="of the model (4 of tiny-pythia, 15 of smollm2-135m)")
    args = parser.parse_args()
    measured = MODELS[args.model_name]
    if not args.suite and measured.prefix:
        parser.error("--model_name needs --suite")
    layer = measured.layer if args.layer is None else args.layer
    if args.what == "run":
        run(measured, layer, args.suite)
    kept = json.loads(kept_file(measured, layer, args.suite).read_text(encoding="utf-8"))
    print(suite_table(kept["tasks"]) if args.suite else table(kept["probes"]))
