"""The kept results of `benchmarks/reliability.py`, and their tables."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.paired_scores import RELIABLE, PairCount, noise_of_differences, noise_of_runs
from benchmarks.sae_families import STUDIES
from benchmarks.sae_panel import snapshots_of
from delta_selectivity.system.whole_file import replacing

KEPT = Path(__file__).resolve().with_name("reliability")  # one file for each model
DIGITS = 5  # significant digits that are kept
OTHER_SEEDS = "close variants, other seeds"
RESAMPLED = "people, folds"  # what is resampled in the runs from which the noise of a score is computed

Gain = tuple[float, float, float]  # the better one's score minus the worse one's, and the ends of its 95 % interval


@dataclass(frozen=True)
class Pairs:
    """Pairs of one kind, and how every score orders them."""

    kind: str
    family: str
    change: str  # what differs between the two SAEs of a pair
    saes: list[tuple[str, str]]  # the worse one, the better one
    gains: dict[str, list[Gain]]  # score -> one for each pair; higher is better, FVU with reversed sign


@dataclass(frozen=True)
class Reliability:
    """The data of all tables."""

    model_name: str
    layer: int
    rows_per_dataset: int  # maximum
    n_rows: int  # of the draw on which pairs are compared
    n_people: int
    n_probes: int
    levels: dict[str, dict[str, float]]  # SAE -> score -> its value
    fold_noise: dict[str, float]  # score -> SD over seeds of the folds, with fixed rows
    runs: dict[str, dict[str, dict[str, list[float]]]]  # what is resampled -> score -> SAE -> its value in each run
    pairs: list[Pairs]
    n_sinks: int = 0  # rows whose norm is above 10 times the median

    def noise(self, metric: str) -> float:
        """Return the SD of one SAE's score over runs with other people and folds."""
        return noise_of_runs(self.runs[RESAMPLED][metric])

    def count(self, metric: str, sets: Iterable[Pairs]) -> PairCount:
        """Count over all pairs of the sets. Without runs, no pair counts as beyond their noise."""
        noise = self.noise(metric) if self.runs else math.inf
        return PairCount.of([gain for each in sets for gain in each.gains[metric]], noise)


def keep(study: Reliability, transfer_only: bool) -> None:
    """Write the results into the repository."""
    KEPT.mkdir(exist_ok=True)
    with replacing(_path(study.model_name, study.rows_per_dataset, transfer_only), "w", encoding="utf-8") as file:
        json.dump(_rounded(asdict(study)), file, separators=(",", ":"), allow_nan=False)
        file.write("\n")


def kept(model_name: str, rows: int, transfer_only: bool) -> Reliability:
    """Return the kept results of a model with so many rows a dataset."""
    content = json.loads(_path(model_name, rows, transfer_only).read_text(encoding="utf-8"))
    pairs = [
        Pairs(
            each["kind"],
            each["family"],
            each["change"],
            [(worse, better) for worse, better in each["saes"]],
            {metric: [(value, low, high) for value, low, high in gains] for metric, gains in each["gains"].items()},
        )
        for each in content.pop("pairs")
    ]
    return Reliability(**content, pairs=pairs)


def _path(model_name: str, rows: int, transfer_only: bool) -> Path:
    return KEPT / f"{model_name}_{rows}{'_transfer' if transfer_only else ''}.json"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


SURE = "Pairs ordered right with a 95 % interval that excludes 0 / ordered wrong, likewise"
"""Title of the only table of a study of the model's own probes alone."""


def tables(study: Reliability, only_sure: bool = False) -> str:
    """Return all tables, or only that of the pairs that are ordered surely, in Markdown."""
    about = (
        f"{study.model_name}: {len(study.levels)} SAEs at layer {study.layer}, {study.n_probes} probes, "
        f"{study.n_rows} rows of {study.n_people} people (at most {study.rows_per_dataset} rows a dataset)"
        f"{f', attention sinks among them: {study.n_sinks}' if study.n_sinks else ''}."
    )
    sections = {
        "Noise of a score: 2.77 SD over runs of one SAE; last, 1.96 SD of a difference within runs": (
            noise_table(study) if study.runs else ""
        ),
        SURE: pair_table(study, lambda count: f"{count.sure} / {count.sure_and_wrong}"),
        "Pairs ordered right by more than 2.77 SD over single runs (people, folds)": (
            pair_table(study, lambda count: str(count.beyond_noise)) if study.runs else ""
        ),
        "Pairs with the right sign, sure or not": pair_table(study, lambda count: str(count.right)),
        "The snapshots, from the least trained to the most": snapshot_table(study),
        "SD of a score over the seeds of training; mean gain of the better one of two close variants": seed_table(
            study
        ),
    }
    shown = {title: table for title, table in sections.items() if table and (title == SURE or not only_sure)}
    return "\n\n".join([about, *(f"**{title}**\n\n{table}" for title, table in shown.items())])


def noise_table(study: Reliability) -> str:
    """Return a table with rows of scores and a column for each thing that is resampled."""
    kinds = list(study.runs)
    head = ["score", "2.77 SD: folds", *(f"2.77 SD: {kind}" for kind in kinds), f"1.96 SD of a difference: {RESAMPLED}"]
    rows = [
        [
            metric,
            f"{RELIABLE * study.fold_noise[metric]:.4f}",
            *(f"{RELIABLE * noise_of_runs(study.runs[kind][metric]):.4f}" for kind in kinds),
            f"{1.96 * noise_of_differences(study.runs[RESAMPLED][metric]):.4f}",
        ]
        for metric in _metrics(study)
    ]
    return _markdown([head, *rows])


def pair_table(study: Reliability, cell: Callable[[PairCount], str]) -> str:
    """Return a table with rows of scores and columns of kinds of pairs; `cell` turns a `PairCount` into text."""
    columns = [
        *((f"{each.kind}, {each.family}", [each]) for each in study.pairs if each.kind == "snapshots"),
        *((change, _close(study, change)) for change in dict.fromkeys(each.change for each in _close(study))),
        ("all close variants", _close(study)),
        (OTHER_SEEDS, [each for each in study.pairs if each.kind == OTHER_SEEDS]),
    ]
    head = ["score", *(f"{name} (of {sum(len(each.saes) for each in sets)})" for name, sets in columns)]
    rows = [[metric, *(cell(study.count(metric, sets)) for _, sets in columns)] for metric in _metrics(study)]
    return _markdown([head, *rows])


def snapshot_table(study: Reliability) -> str:
    """Return a table with rows of snapshots and columns of selected scores."""
    shown = [metric for metric in _metrics(study) if "balanced" not in metric]
    rows = [
        [family, str(snapshot.step), *(f"{study.levels[snapshot.name][metric]:.4f}" for metric in shown)]
        for family in dict.fromkeys(each.family for each in study.pairs)
        for snapshot in snapshots_of(family, STUDIES[study.model_name])
    ]
    return _markdown([["family", "steps", *shown], *rows])


def seed_table(study: Reliability) -> str:
    """Return a table with rows of scores.

    Columns: SD over seeds within recipes, then the mean gain of each change by family.
    """
    close = _close(study)
    recipes = {end for each in close for end in zip(*each.saes, strict=True)}  # the same recipe with all seeds
    head = ["score", "SD over seeds", *(f"{each.change}, {each.family}" for each in close)]
    rows = []
    for metric in _metrics(study):
        spread = [statistics.variance([study.levels[sae][metric] for sae in recipe]) for recipe in sorted(recipes)]
        gains = [statistics.fmean(value for value, _, _ in each.gains[metric]) for each in close]
        rows.append([metric, f"{statistics.fmean(spread) ** 0.5:.4f}", *(f"{gain:+.4f}" for gain in gains)])
    return _markdown([head, *rows])


def _close(study: Reliability, change: str | None = None) -> list[Pairs]:
    """Return the close variants of the same seed, for one change or all."""
    return [each for each in study.pairs if each.kind == "close variants" and change in (None, each.change)]


def _metrics(study: Reliability) -> list[str]:
    return list(next(iter(study.levels.values())))


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
