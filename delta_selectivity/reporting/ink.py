"""Colours and styles of plots, readable for colour-blind readers.

Series: Okabe & Ito 2008 (*Color Universal Design*), with a marker each, so that they differ in grey print as well.
Deltas: ColorBrewer's RdBu, red below 0 (lost) and blue above; 0 is always its pale middle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from delta_selectivity.reporting.names import abridged

INK = "#1b1f24"  # text and the model's own curve; these three follow the reader's light or dark mode in the page
MUTED = "#616975"  # axes, notes, baselines
RULE = "#d6dae0"  # grid lines
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vPX*"
HATCH = "#4a505880"  # the same in both modes: cells are pale in both
UNSHOWN = "#f7f7f7"  # a cell whose value is not significant: the pale middle of the scale, whatever the value
NO_VALUE = "#c9ced6"  # a cell without a number
FONT = ("DejaVu Sans", "Verdana", "sans-serif")  # the first measures the text; it is wider than what a page may use

STYLE: dict[Any, Any] = {
    "font.family": FONT[0],
    "font.size": 11,
    "text.color": INK,
    "text.parse_math": False,  # names come from data: a dollar is a dollar
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 11,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.unicode_minus": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and copied
}


@dataclass(frozen=True)
class Series:
    """How one SAE is drawn everywhere in a report."""

    colour: str
    marker: str


def series(index: int) -> Series:
    """Of the SAE with this index: no two of the first 48 are alike, and neighbours differ in colour and marker."""
    turn = index // len(COLOURS)
    return Series(COLOURS[index % len(COLOURS)], MARKERS[(index + turn) % len(MARKERS)])


def text_width(text: str, size: float = 11) -> float:
    """About how many pixels wide the text is drawn; rather too many than too few."""
    return 0.62 * size * len(text)


def shortened(text: str, width: float, size: float = 11) -> str:
    """The text, with its middle left out if it is wider than this many pixels."""
    return abridged(text, characters(width, size))


def characters(width: float, size: float = 11) -> int:
    """How many fit into this many pixels, at least three."""
    return max(int(width / text_width("x", size)), 3)
