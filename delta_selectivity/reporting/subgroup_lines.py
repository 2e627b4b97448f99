"""Losses by subgroup of many cells, as lines for a data frame, a terminal or the page."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.probing.probe_statistics import ProbeScores
from delta_selectivity.reporting.groups import File, dataset_of
from delta_selectivity.reporting.results import by_sae, cells, is_baseline
from delta_selectivity.reporting.rows import CellRows, Place, rows_of
from delta_selectivity.reporting.subgroups import Grouping, Loss, grouping_of, losses, mean_losses, with_q_values

_FIGURES = ("n_rows", "n_people", "delta_sel", "ci_low", "ci_high", "against", "against_ci_low", "against_ci_high",
            "p_value", "q_value")  # fmt: skip
COLUMNS = ("sae", "dataset", "layer", "probe", "by", "group", *_FIGURES)
MEAN_COLUMNS = ("sae", "by", "group", "n_cells", *_FIGURES)

By = Mapping[str, Mapping[str, str]]  # from the caller: title of a grouping -> key of a person -> group
ReadRows = Callable[[Place], CellRows]


def subgroup_lines(
    files: Sequence[File], sae: str | None, probe: str | None, layer: int | None, by: By
) -> list[tuple[Any, ...]]:
    """Return the values of `COLUMNS` for each group of each cell with stored scores; q values cover all lines."""
    where, all_losses = [], []
    for name, place, stored, known in _cells(files, sae, probe, layer, by):
        cell_losses = losses(stored, known)
        where += [(name, dataset_of(place.file).removeprefix("wikidata_"), place.layer, place.probe)] * len(cell_losses)
        all_losses += cell_losses
    return [
        (*at, loss.by, loss.group, *_figures(loss)) for at, loss in zip(where, with_q_values(all_losses), strict=True)
    ]


def mean_subgroup_lines(
    files: Sequence[File], sae: str | None, probe: str | None, layer: int | None, by: By, read: ReadRows = rows_of
) -> list[tuple[Any, ...]]:
    """Return the values of `MEAN_COLUMNS` for each group of each SAE: means over its cells; q values cover all lines.

    If an SAE's files differ in folds or repeats, only the most frequent combination is used.
    """
    where, all_losses = [], []
    for name, of_sae in itertools.groupby(_cells(files, sae, probe, layer, by, read), key=lambda cell: cell[0]):
        cells = [(stored, known) for _, _, stored, known in of_sae]
        design = Counter(_design(stored) for stored, _ in cells).most_common(1)[0][0]
        means = mean_losses([cell for cell in cells if _design(cell[0]) == design])
        where += [name] * len(means)
        all_losses += means
    return [
        (name, loss.by, loss.group, loss.n_cells, *_figures(loss))
        for name, loss in zip(where, with_q_values(all_losses), strict=True)
    ]


def _cells(
    files: Sequence[File], sae: str | None, probe: str | None, layer: int | None, by: By, read: ReadRows = rows_of
) -> Iterator[tuple[str, Place, ProbeScores, list[Grouping]]]:
    """Yield SAE, place, scores and groupings of each requested cell that has stored scores."""
    for name, files_of_sae in by_sae(files).items():
        if sae not in (None, name) or (sae is None and is_baseline(files_of_sae[0][1])):
            continue
        for file in files_of_sae:
            for at, of, _, result in cells(file[1]):
                if result.get("reason") or probe not in (None, of) or layer not in (None, at):
                    continue
                place = Place(file, at, of)
                try:
                    rows = read(place)
                except RequestError:
                    continue
                known = list(rows.groupings)
                if rows.kept is not None and rows.places is not None:
                    known += [grouping_of(title, groups, rows.kept, rows.places) for title, groups in by.items()]
                yield name, place, rows.stored, known


def _design(stored: ProbeScores) -> tuple[int, int]:
    return len(stored.folds), stored.n_folds


def _figures(loss: Loss) -> tuple[Any, ...]:
    estimates = (x for one in (loss.delta_sel, loss.against) for x in (one.value, one.low, one.high))
    return loss.n_rows, loss.n_people, *estimates, loss.against.p_value, loss.q_value
