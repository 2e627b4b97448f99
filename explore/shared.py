"""Shared code of the notebooks: paths, results as one table, and the styles of the reports.

    from shared import RESULTS, results_table
    results_table(RESULTS)          # pandas: a line for each SAE, dataset, layer and probe

Importing this module makes the project's modules importable from a notebook, wherever Jupyter was started.
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
"""Folder of the results to look at: the kept demo, or the folder in the environment variable RESULTS."""

warnings.filterwarnings("ignore", "IProgress not found")  # of tqdm, about a missing notebook widget
plt.rcParams.update(STYLE | {"figure.constrained_layout.use": True, "axes.facecolor": "white", "figure.dpi": 90})
pd.set_option("display.max_columns", 30, "display.width", 160, "display.precision", 3)


def short_name(path: Path) -> str:
    """Return a path for display: relative to the project if it is inside."""
    return str(path.resolve().relative_to(PROJECT)) if path.resolve().is_relative_to(PROJECT) else path.name


def results_table(folder: Path) -> pd.DataFrame:
    """Return a line for each probe at each layer of each result file below the folder, with the figures of its layer.

    Columns: `sae`, `baseline` (its kind; None for an SAE), `dataset`, `path`, `layer`, `probe`, and then every key that
    docs/numbers.md defines. Raises `RequestError` if there are no results, or a file was edited or truncated.
    """
    lines = report_files.lines(report_files.load(report_files.result_files(folder)))
    return pd.DataFrame([{**line, "sae": result_file.slug(line["sae"])} for line in lines])


def open_grid(n: int, columns: int = 4, width: float = 3.1, height: float = 2.5) -> tuple[plt.Figure, list[plt.Axes]]:
    """Return a figure with n panels that share their axes, filled row by row."""
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
    """Make axes ("x", "y" or "xy") logarithmic, with plain numbers at 1, 2 and 5 instead of powers of ten."""
    for name in axes:
        panel.set(**{f"{name}scale": "log"})
        axis = getattr(panel, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
