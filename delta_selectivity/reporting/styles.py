"""Colours and styles of plots, readable for colour-blind readers.

Series: Okabe & Ito 2008 (*Color Universal Design*), each with a marker, so that they also differ in greyscale print.
Deltas: ColorBrewer's RdBu, red below 0 (lost), blue above, with 0 at the pale centre.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from delta_selectivity.reporting.names import elide_middle

TEXT_COLOUR = "#1b1f24"  # text and the model's own curve; these three colours follow the page's light or dark mode
MUTED = "#616975"  # axes, notes, baselines
RULE = "#d6dae0"  # grid lines
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vPX*"
HATCH = "#4a505880"  # the same in both modes, because cells are pale in both
NOT_SIGNIFICANT = "#f7f7f7"  # cells whose value is not significant: the pale centre of the colour scale
NO_VALUE = "#c9ced6"  # cells without a number
FONT = ("DejaVu Sans", "Verdana", "sans-serif")  # the first is the widest, so text is measured with it

STYLE: dict[Any, Any] = {
    "font.family": FONT[0],
    "font.size": 11,
    "text.color": TEXT_COLOUR,
    "text.parse_math": False,  # names come from data and may contain a dollar sign
    "axes.edgecolor": MUTED,
    "axes.labelcolor": TEXT_COLOUR,
    "axes.labelsize": 11,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.unicode_minus": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": TEXT_COLOUR,
    "ytick.labelcolor": TEXT_COLOUR,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "svg.fonttype": "none",  # text stays text: accessible, searchable and selectable
}


@dataclass(frozen=True)
class Series:
    """Style of one SAE in all plots of a report."""

    colour: str
    marker: str


def series(index: int) -> Series:
    """Return the style of the SAE with this index. The first 48 differ; successive ones differ in colour and marker."""
    turn = index // len(COLOURS)
    return Series(COLOURS[index % len(COLOURS)], MARKERS[(index + turn) % len(MARKERS)])


def text_width(text: str, size: float = 11) -> float:
    """Return the approximate width of a text in pixels, overestimated rather than underestimated."""
    return 0.62 * size * len(text)


def shortened(text: str, width: float, size: float = 11) -> str:
    """Return the text, with its middle omitted if it is wider than this many pixels."""
    return elide_middle(text, characters(width, size))


def characters(width: float, size: float = 11) -> int:
    """Return how many characters fit into this many pixels, at least three."""
    return max(int(width / text_width("x", size)), 3)
