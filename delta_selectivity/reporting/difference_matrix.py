"""Plot the paired differences of delta_sel between all SAEs of a report as a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from delta_selectivity.reporting.drawing import Drawing, Plot, add_title, axes_at, canvas
from delta_selectivity.reporting.matrix import MatrixCell, draw_matrix, scale_end, set_matrix_axes
from delta_selectivity.reporting.names import short_names
from delta_selectivity.reporting.numbers import probability, signed, span
from delta_selectivity.reporting.study import Comparison, Study
from delta_selectivity.reporting.styles import characters, text_width

ROW, COLUMN = 22, 58  # pixels
MIN_SAES = 3  # minimum number of SAEs, since two have only one difference
NAMES_WIDTH = 180
COLUMNS = ("sae", "compared_with", "difference", "ci_low", "ci_high", "p_value")


def difference_matrix(study: Study) -> Plot | None:
    """Plot rows minus columns, best mean delta_sel first; None for fewer than three SAEs or no comparable pairs."""
    order = sorted(study.saes, key=lambda sae: -(sae.overall("delta_sel")[0] or 0.0))
    pairs = [pair for one in order for other in order if (pair := study.comparison(one.name, other.name))]
    if len(order) < MIN_SAES or not pairs:
        return None
    places = {sae.name: place for place, sae in enumerate(order)}
    cells = [_cell(pair, places) for pair in pairs]
    data = tuple((pair.one.label, pair.other.label, *_figures(pair)) for pair in pairs)
    description = (
        "A matrix of SAEs by SAEs in the same order, the best first. Each cell is the row's mean delta_sel minus the "
        "column's, paired. Cells are hatched if the 95 % interval includes 0."
    )
    draw = partial(_draw, [sae.label for sae in order], cells)
    return Plot("rivals_delta_sel", "Row minus column: delta_sel", description, draw, COLUMNS, data)


def _figures(pair: Comparison) -> tuple[float, ...]:
    return tuple(pair.figures[f"delta_sel{end}"] for end in ("", "_ci_low", "_ci_high", "_p_value"))


def _cell(pair: Comparison, places: dict[str, int]) -> MatrixCell:
    value, low, high, p = _figures(pair)
    tip = f"{pair.one.label} − {pair.other.label}: {signed(value, 4)} ({span(low, high, 4)}), p {probability(p)}"
    is_significant = low > 0 or high < 0
    return MatrixCell(places[pair.one.name], places[pair.other.name], value, signed(value), is_significant, tip)


def _draw(names: Sequence[str], cells: Sequence[MatrixCell]) -> Drawing:
    short = short_names(names, characters(NAMES_WIDTH - 30, 10))
    labels = [f"{name}  {number}" for number, name in enumerate(short, 1)]
    left = max(text_width(label, 10) for label in labels) + 8
    figure = canvas(left + COLUMN * len(names) + 4, 62 + ROW * len(names) + 4)
    add_title(figure, "Row minus column: delta_sel", "paired; hatched: the 95 % interval includes 0")
    axes = axes_at(figure, left, 62, COLUMN * len(names), ROW * len(names))
    set_matrix_axes(axes, len(names), len(names))
    axes.xaxis.tick_top()
    places = [place + 0.5 for place in range(len(names))]
    axes.set_xticks(places, [str(number) for number in range(1, len(names) + 1)], fontsize=10)
    axes.set_yticks(places, labels, fontsize=10)
    largest = max(abs(cell.value or 0.0) for cell in cells)
    return Drawing(figure, draw_matrix(axes, cells, scale_end(largest)))
