"""Heatmaps of delta_sel by layer and probe, one per SAE and dataset or family, with a common colour scale."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from delta_selectivity.records.verdicts import MARKS, is_significant
from delta_selectivity.reporting.drawing import Drawing, Plot, add_title, axes_at, canvas
from delta_selectivity.reporting.matrix import (
    MatrixCell,
    colour_of,
    draw_matrix,
    scale_end,
    set_matrix_axes,
    text_colour_on,
)
from delta_selectivity.reporting.names import short_names
from delta_selectivity.reporting.numbers import signed, span
from delta_selectivity.reporting.study import Cell, Sae, Study
from delta_selectivity.reporting.styles import MUTED, shortened, text_width

Place = tuple[str, str]  # dataset, probe

ROW = 22  # pixels
COLUMN = 58
LEFT = 44  # margin for the layer numbers
MIN_WIDTH = 190  # minimum, for the name of the SAE
MAX_TITLE = 25  # characters of the name of an SAE that fit there
LABEL = 130  # pixels for the name of a probe
COLUMNS = (
    "sae", "dataset", "layer", "probe", "verdict", "delta_sel", "ci_low", "ci_high", "p_value", "q_value", "preserved",
    "reason",
)  # fmt: skip


def colour_limit(study: Study) -> float:
    """Return the end of the colour scale, from the largest |delta_sel| shown."""
    largest = max((abs(c.result["delta_sel"]) for sae in study.shown_in_full for c in sae.measured), default=0.0)
    return scale_end(largest)


def heatmap(study: Study, sae: Sae, dataset: str, probes: Sequence[Place], name: str) -> Plot:
    """Plot the cells of one SAE and these probes, in this order; dataset: name of the dataset or family."""
    cells = [cell for cell in sae.cells if (cell.dataset, cell.probe) in probes]
    n_significant = sum(is_significant(cell.result) for cell in cells)
    title = f"delta_sel of {sae.label} on {dataset}"
    description = (
        f"A matrix of layers by probes. {n_significant} of {len(cells)} cells differ significantly from 0; "
        "the others are hatched. Red marks losses, blue marks gains."
    )
    rows = tuple(_row(sae, cell) for cell in cells)
    labels = [one.label for one in study.saes_and_baselines]
    short_name = short_names(labels, MAX_TITLE)[labels.index(sae.label)]
    numbers = [study.numbers[id(cell)] for cell in cells]
    draw = partial(_draw, cells, numbers, short_name, dataset, probes, colour_limit(study))
    return Plot(name, title, description, draw, COLUMNS, rows)


def _row(sae: Sae, cell: Cell) -> tuple[object, ...]:
    return (sae.label, cell.dataset, cell.layer, cell.probe, cell.verdict, *map(cell.result.get, COLUMNS[5:]))


def _draw(
    cells: list[Cell], numbers: list[int], title: str, dataset: str, places: Sequence[Place], limit: float
) -> Drawing:
    layers, probes = sorted({cell.layer for cell in cells}), [probe for _, probe in places]
    longest = max(text_width(shortened(probe, LABEL, 10), 10) for probe in probes)
    flat = longest <= COLUMN
    head, overhang = (56, 0) if flat else (48 + 0.6 * longest, 0.7 * longest - COLUMN / 2)
    width = max(LEFT + COLUMN * len(probes) + overhang + 4, MIN_WIDTH)
    figure = canvas(width, head + ROW * len(layers) + 4)
    add_title(figure, title, dataset)
    axes = axes_at(figure, LEFT, head, COLUMN * len(probes), ROW * len(layers))
    set_matrix_axes(axes, len(layers), len(probes))
    _label(axes, layers, probes, flat)
    matrix = [_cell(cell, layers.index(cell.layer), places.index((cell.dataset, cell.probe))) for cell in cells]
    parts = {f"cell-{place}{end}": number for place, number in enumerate(numbers) for end in ("", "-hatch", "-text")}
    return Drawing(figure, draw_matrix(axes, matrix, limit), parts)


def _label(axes: Axes, layers: list[int], probes: list[str], flat: bool) -> None:
    axes.set_yticks([row + 0.5 for row in range(len(layers))], [str(layer) for layer in layers])
    axes.xaxis.tick_top()
    rotation: dict[str, Any] = {} if flat else {"rotation": 40, "ha": "left", "rotation_mode": "anchor"}
    names = [shortened(probe, LABEL, 10) for probe in probes]
    axes.set_xticks([column + 0.5 for column in range(len(probes))], names, fontsize=10, **rotation)
    axes.text(-0.12, -0.25, "layer", ha="right", va="bottom", fontsize=10, color=MUTED)


def _cell(cell: Cell, row: int, column: int) -> MatrixCell:
    where = f"layer {cell.layer}, {cell.probe}"
    if not cell.measured:
        return MatrixCell(row, column, None, "none", False, f"{where}: not measured ({cell.result['reason']})")
    result = cell.result
    delta = signed(result["delta_sel"])
    tip = f"{where}: {delta} ({span(result['ci_low'], result['ci_high'])}), {cell.verdict}"
    text = f"{delta} {MARKS[cell.verdict]}"
    return MatrixCell(row, column, result["delta_sel"], text, is_significant(result), tip)


def scale(study: Study) -> Plot:
    """Plot the colour scale of all heatmaps."""
    limit = colour_limit(study)
    description = f"A colour scale from red (a loss of {limit:.2f}) over pale (0) to blue (a gain of {limit:.2f})."
    steps = tuple((limit * step / 4,) for step in range(-4, 5))
    return Plot("scale", "Colours of delta_sel", description, partial(_draw_scale, limit), ("delta_sel",), steps)


def _draw_scale(limit: float) -> Drawing:
    figure = canvas(330, 42)
    axes = axes_at(figure, 2, 2, 326, 20)
    set_matrix_axes(axes, 1, 9)
    for step in range(9):
        value = limit * (step - 4) / 4
        axes.axvspan(step, step + 1, facecolor=colour_of(value, limit), edgecolor="white", linewidth=0.8)
        ink = text_colour_on(colour_of(value, limit))
        axes.text(step + 0.5, 0.52, signed(value, 2), ha="center", va="center", fontsize=9, color=ink)
    axes.set(xticks=[], yticks=[])
    for place, text, side in ((0, "lost", "left"), (4.5, "delta_sel", "center"), (9, "gained", "right")):
        axes.text(place, 1.8, text, ha=side, va="bottom", fontsize=10)
    return Drawing(figure)
