"""Losses by subgroup over many cells as lines of a data frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.reporting.groups import File, dataset_of
from delta_selectivity.reporting.results import by_sae, cells, is_baseline
from delta_selectivity.reporting.rows import Place, rows_of
from delta_selectivity.reporting.subgroups import grouping_of, losses, with_q_values

COLUMNS = ("sae", "dataset", "layer", "probe", "by", "group", "n_rows", "n_people", "delta_sel", "ci_low", "ci_high",
           "against", "against_ci_low", "against_ci_high", "p_value", "q_value")  # fmt: skip


def subgroup_lines(
    files: Sequence[File], sae: str | None, probe: str | None, layer: int | None, by: Mapping[str, Mapping[str, str]]
) -> list[tuple[Any, ...]]:
    """The values of `COLUMNS` for each group of each cell whose scores are there; q over all of them."""
    where, found = [], []
    for name, own in by_sae(files).items():
        if sae not in (None, name) or (sae is None and is_baseline(own[0][1])):
            continue
        for file in own:
            for at, of, _, result in cells(file[1]):
                if result.get("reason") or probe not in (None, of) or layer not in (None, at):
                    continue
                try:
                    rows = rows_of(Place(file, at, of))
                except RequestError:
                    continue
                known = list(rows.groupings)
                if rows.kept is not None and rows.places is not None:
                    known += [grouping_of(title, groups, rows.kept, rows.places) for title, groups in by.items()]
                own_losses = losses(rows.stored, known)
                where += [(name, dataset_of(file).removeprefix("wikidata_"), at, of)] * len(own_losses)
                found += own_losses
    return [
        (
            *place, loss.by, loss.group, loss.n_rows, loss.n_people,
            *(x for one in (loss.delta_sel, loss.against) for x in (one.value, one.low, one.high)),
            loss.against.p_value, loss.q_value,
        )
        for place, loss in zip(where, with_q_values(found), strict=True)
    ]  # fmt: skip
