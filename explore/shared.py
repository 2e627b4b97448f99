"""What the notebooks share: where things are, results as one table, and the ink of the reports.

    from shared import RESULTS, results_table
    results_table(RESULTS)          # pandas: a line for each SAE, dataset, layer and probe

Importing it makes the project's modules importable from a notebook, wherever Jupyter was started.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import LogLocator, NullLocator

from delta_selectivity.records import result_file
from delta_selectivity.reporting import results as report_files
from delta_selectivity.reporting.styles import COLOURS, MARKERS, MUTED, RULE, STYLE

PROJECT = Path(__file__).resolve().parent.parent

__all__ = [
    "COLOURS",
    "MARKERS",
    "MUTED",
    "PROJECT",
    "RESULTS",
    "RULE",
    "log_scale",
    "open_grid",
    "results_table",
    "short_name",
]

RESULTS = Path(os.environ.get("RESULTS", PROJECT / "results" / "demo"))
"""Whose results are looked at: the kept demo's, or those of the folder in the variable RESULTS."""

warnings.filterwarnings("ignore", "IProgress not found")  # of tqdm, about a progress bar that nobody misses
plt.rcParams.update(STYLE | {"figure.constrained_layout.use": True, "axes.facecolor": "white", "figure.dpi": 90})
pd.set_option("display.max_columns", 30, "display.width", 160, "display.precision", 3)


def short_name(path: Path) -> str:
    """What to call a path in a sentence: from the project on where it is inside."""
    return str(path.resolve().relative_to(PROJECT)) if path.resolve().is_relative_to(PROJECT) else path.name


def results_table(folder: Path) -> pd.DataFrame:
    """A line for each probe at each layer of each result file below the folder, with the figures of its layer.

    Columns: `sae`, `baseline` (its kind; None for an SAE), `dataset`, `path`, `layer`, `probe`, and then every key that
    docs/numbers.md defines. Raises `RequestError` if there are no results, or a file was edited or cut short.
    """
    lines = report_files.lines(report_files.load(report_files.result_files(folder)))
    return pd.DataFrame([{**line, "sae": result_file.slug(line["sae"])} for line in lines])


def open_grid(n: int, columns: int = 4, width: float = 3.1, height: float = 2.5) -> tuple[plt.Figure, list[plt.Axes]]:
    """A figure with n panels that share their axes, filled row by row."""
    rows = -(-n // columns)
    figure, axes = plt.subplots(
        rows, min(n, columns), figsize=(width * min(n, columns), height * rows), sharex=True, sharey=True, squeeze=False
    )
    panels = list(axes.flat)
    for empty in panels[n:]:
        empty.set_visible(False)
    for panel in panels[:n]:
        panel.grid(axis="y")
    return figure, panels[:n]


def log_scale(panel: plt.Axes, axes: str) -> None:
    """Logarithmic axes ("x", "y" or "xy") with plain numbers at 1, 2 and 5: the style writes no powers of ten."""
    for name in axes:
        panel.set(**{f"{name}scale": "log"})
        axis = getattr(panel, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
