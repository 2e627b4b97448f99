"""A matrix of differences: colour for size and sign, a number in every cell, hatching where not significant.

Information is never in colour alone: every cell has a text, and cells that are not significant are hatched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_hex, to_rgb
from matplotlib.patches import Rectangle

from delta_selectivity.reporting.styles import HATCH, NO_VALUE, NOT_SIGNIFICANT

DIVERGING = "RdBu"  # low values, losses, are red
RIM_X, RIM_Y = 0.06, 0.14  # coloured rim around the hatching, as shares of a cell's width and height


@dataclass(frozen=True)
class MatrixCell:
    """One cell."""

    row: int
    column: int
    value: float | None  # None: no number; only `text` is shown
    text: str
    is_significant: bool  # whether it differs significantly from 0
    tip: str


def scale_end(largest: float) -> float:
    """Return the end of a scale that includes this value: a multiple of 0.04, so that its quarters are round."""
    return 0.04 * max(math.ceil(round(largest / 0.04, 6)), 1)


def colour_of(value: float, limit: float) -> str:
    """Return the colour on the scale from -limit to limit."""
    return to_hex(matplotlib.colormaps[DIVERGING](Normalize(-limit, limit)(value)))


def text_colour_on(colour: str) -> str:
    """Return black or white, whichever has more contrast with the colour (WCAG relative luminance)."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return "#ffffff" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179 else "#000000"


def draw_matrix(axes: Axes, cells: Sequence[MatrixCell], limit: float) -> dict[str, str]:
    """Draw the cells in axes with rows downwards and columns; returns the tooltips of the cells by gid."""
    tips = {}
    for number, cell in enumerate(cells):
        colour = NO_VALUE if cell.value is None else colour_of(cell.value, limit)
        gid = f"cell-{number}"
        tips[gid] = cell.tip
        box = Rectangle((cell.column, cell.row), 1, 1, facecolor=colour, edgecolor="white", linewidth=1, gid=gid)
        axes.add_patch(box)
        if cell.value is not None and not cell.is_significant:
            colour = NOT_SIGNIFICANT
            axes.add_patch(_hatched(cell.row, cell.column, f"{gid}-hatch"))
        axes.text(
            cell.column + 0.5, cell.row + 0.52, cell.text, ha="center", va="center", fontsize=9.5,
            fontweight="bold" if cell.is_significant else "normal", color=text_colour_on(colour), gid=f"{gid}-text",
        )  # fmt: skip
        tips[f"{gid}-text"] = cell.tip
    return tips


def _hatched(row: int, column: int, gid: str) -> Rectangle:
    """Return a pale, hatched rectangle for a value that is not significant; it leaves a coloured rim."""
    place = (column + RIM_X, row + RIM_Y)
    width, height = 1 - 2 * RIM_X, 1 - 2 * RIM_Y
    return Rectangle(
        place, width, height, facecolor=NOT_SIGNIFICANT, hatch="////", edgecolor=HATCH, linewidth=0, gid=gid
    )


def set_matrix_axes(axes: Axes, n_rows: int, n_columns: int) -> None:
    """Give the axes matrix coordinates, and remove their frame."""
    axes.set(xlim=(0, n_columns), ylim=(n_rows, 0))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
