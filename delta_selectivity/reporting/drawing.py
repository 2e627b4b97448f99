"""A plot with its title, caption and data, as SVG, PNG or CSV.

One pixel of the page is one point of matplotlib at 72 dpi, so sizes here are sizes on the page at full scale.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from delta_selectivity.reporting.csv_file import csv_text
from delta_selectivity.reporting.styles import MUTED, STYLE, shortened
from delta_selectivity.reporting.svg import accessible

DPI = 72
PNG_DPI = 200  # for slides and papers


@dataclass(frozen=True)
class Drawing:
    """A matplotlib figure with the tooltips of its parts."""

    figure: Figure
    tips: dict[str, str] = field(default_factory=dict)  # gid of an artist -> its text
    cells: dict[str, int] = field(default_factory=dict)  # gid of an artist -> number of the cell that it shows


@dataclass(frozen=True)
class Plot:
    """One plot of a report, drawn on demand and reproducibly."""

    name: str  # of its files, without suffix; unique in the report
    title: str
    description: str  # alternative text of one or two sentences
    draw: Callable[[], Drawing]
    columns: tuple[str, ...]  # of the numbers in it
    rows: tuple[tuple[Any, ...], ...]

    def svg(self) -> str:
        """Return a stand-alone SVG document."""
        drawing, raw = self._render("svg")
        return accessible(raw.decode(), self.name, self.title, self.description, drawing.tips, drawing.cells)

    def png(self) -> bytes:
        """Return the plot as PNG on a white background."""
        return self._render("png", dpi=PNG_DPI, facecolor="white")[1]

    def csv(self) -> str:
        """Return the plot's numbers in full precision as CSV."""
        return csv_text(self.columns, self.rows)

    def _render(self, form: str, **options: Any) -> tuple[Drawing, bytes]:
        out = io.BytesIO()
        about = {"Date": None} if form == "svg" else {"Software": None}
        with _style(self.name):
            drawing = self.draw()
            drawing.figure.savefig(out, format=form, metadata=about, **{"transparent": form == "svg", **options})
        return drawing, out.getvalue()


@contextmanager
def _style(name: str) -> Iterator[None]:
    """Apply our style instead of the user's, with deterministic ids; ignore warnings about missing glyphs."""
    with warnings.catch_warnings(), matplotlib.style.context(["default", {**STYLE, "svg.hashsalt": name}]):
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def canvas(width: float, height: float) -> Figure:
    """Return an empty figure of this size in pixels."""
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI)


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes with this position and size in pixels, measured from the figure's upper left corner."""
    full_width, full_height = figure.get_size_inches() * DPI
    bottom = full_height - top - height
    return figure.add_axes((left / full_width, bottom / full_height, width / full_width, height / full_height))


def add_title(figure: Figure, title: str, subtitle: str = "") -> None:
    """Add a title in the upper left corner and a muted line below it, both shortened to the figure's width."""
    width, height = figure.get_size_inches() * DPI
    figure.text(0, 1 - 2 / height, shortened(title, width, 12), va="top", fontsize=12, fontweight="bold")
    figure.text(0, 1 - 19 / height, shortened(subtitle, width, 10), va="top", fontsize=10, color=MUTED)
