"""The page's tables of SAEs: one line for each, and comparisons of each with the next."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from delta_selectivity.records import result_file
from delta_selectivity.records.verdicts import LOST, MOVED, PRESERVED
from delta_selectivity.reporting.html import Markup, element, join, table
from delta_selectivity.reporting.names import short_names
from delta_selectivity.reporting.numbers import number, probability, signed, span, typeset, unsigned_span
from delta_selectivity.reporting.ranking import in_order, rank
from delta_selectivity.reporting.results import mean, optional_figures
from delta_selectivity.reporting.study import Sae, Study
from delta_selectivity.reporting.styles import MUTED, series

COUNTED = (LOST, MOVED, PRESERVED)
HEAD = (
    "SAE", "rank", "survives (transfer_r2)", "cells", "model_sel", "sae_sel", "mean delta_sel", "detectable", *COUNTED,
    "fvu_pos", "fvu_whole", "L0",
)  # fmt: skip
MAX_NAME = 26  # characters of the name of an SAE
PAIR_HEAD = ("SAE", "compared with", "difference of transfer_r2", "p", "difference of delta_sel", "p")


def sae_table(study: Study) -> Markup:
    """Return a line for each SAE, by rank, and for each baseline below: means over its cells."""
    ranking = rank(study)
    views = optional_figures(cell.record for sae in study.saes_and_baselines for cell in sae.measured)
    rows = (
        [*_line(study, sae, ranking.place(sae)), *_optional_columns(sae, views)] for sae in in_order(study, ranking)
    )
    return table((*HEAD, *views), rows)


def _optional_columns(sae: Sae, views: Sequence[str]) -> list[str]:
    return [number(mean(cell.record.get(view) for cell in sae.measured), ".3f") for view in views]


def _line(study: Study, sae: Sae, place: str) -> list[str]:
    n_cells = len(sae.measured)
    delta, low, high = sae.overall("delta_sel")
    r2, r2_low, r2_high = sae.overall("transfer_r2")
    return [
        join([_swatch(study, sae), short_label(study, sae)]),
        place.replace("-", "–"),
        _estimate(typeset(number(r2, ".3f")), unsigned_span(r2_low, r2_high)),
        str(n_cells),
        number(sae.mean("model_sel"), ".3f"),
        number(sae.mean("sae_sel"), ".3f"),
        _estimate(signed(delta, 4), span(low, high, 4)),
        number(sae.level.get("delta_sel_detectable"), ".4f"),
        *(f"{sae.count(word)} of {n_cells}" for word in COUNTED),
        number(sae.mean_figure("fvu_pos"), ".3f"),
        number(sae.mean_figure("fvu_whole"), ".3f"),
        number(sae.mean_figure("l0"), ".1f"),
    ]


def short_label(study: Study, sae: Sae) -> Markup:
    """Return the SAE's name without the part that all names share, with the full name as tooltip."""
    labels = [one.label for one in study.saes_and_baselines]
    return element("span", short_names(labels, MAX_NAME)[labels.index(sae.label)], title=sae.label)


def _estimate(value: str, interval: str) -> Markup:
    return join([element("b", value), " ", element("small", interval)])


def _swatch(study: Study, sae: Sae) -> Markup:
    """Return a sample of the SAE's colour in all plots."""
    colour = MUTED if sae.is_baseline else series(study.saes.index(sae)).colour
    return element("span", "●", style=f"color:{colour}", class_="swatch", aria_hidden="true")


def pair_table(study: Study) -> Markup | None:
    """Return a table of each SAE and the next, each baseline and its SAE; None if no two can be compared."""
    rows = [
        [short_label(study, pair.one), short_label(study, pair.other), *_difference(pair.figures)]
        for pair in study.neighbours
    ]
    return table(PAIR_HEAD, rows) if rows else None


def _difference(comparison: result_file.Json) -> list[str]:
    cells: list[str] = []
    for score in ("transfer_r2", "delta_sel"):
        value, low, high, p = (comparison[f"{score}{end}"] for end in ("", "_ci_low", "_ci_high", "_p_value"))
        cells += [_estimate(signed(value, 4), span(low, high, 4)), probability(p)]
    return cells


def detectable_sentence(study: Study) -> str:
    """Return a sentence about the smallest detectable difference of one cell; empty if nothing was measured."""
    values = [cell.result["detectable"] for sae in study.shown_in_full for cell in sae.measured]
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return (
        f"A true difference of {statistics.median(known):.3f} in a cell (median; {min(known):.3f} to {max(known):.3f}) "
        "is detected with 80 % probability. Smaller differences often remain undecided."
    )
