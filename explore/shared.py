"""Helpers of the notebooks: paths, results as one table, the page in a notebook, and the style of the plots.

from shared import find_results, results_table
results_table(find_results(""))          # pandas: a line for each SAE, dataset, layer and probe
"""

from __future__ import annotations

import html
import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML
from matplotlib.ticker import LogLocator, NullLocator

from delta_selectivity import Results
from delta_selectivity.records import result_file
from delta_selectivity.reporting import results as report_files
from delta_selectivity.reporting.styles import COLOURS, MARKERS, MUTED, RULE, STYLE

PROJECT = Path(__file__).resolve().parent.parent

__all__ = [
    "COLOURS",
    "MARKERS",
    "MUTED",
    "PROJECT",
    "RULE",
    "find_results",
    "log_scale",
    "open_grid",
    "results_table",
    "short_name",
    "show_page",
]

warnings.filterwarnings("ignore", "IProgress not found")  # of tqdm; no notebook shows its bars
plt.rcParams.update(STYLE | {"figure.constrained_layout.use": True, "axes.facecolor": "white", "figure.dpi": 90})
pd.set_option("display.max_columns", 30, "display.width", 160, "display.precision", 3)


def find_results(folder: str | os.PathLike[str]) -> Path:
    """Return a folder of results, relative to the notebook or to the repository; if it is empty, that of the demo."""
    place = Path(folder or Path("results", "demo"))
    return place if folder and place.exists() else PROJECT / place


def show_page(folder: Path, height: int = 900) -> HTML:
    """Return the page of all results below a folder, as `Results.report` writes it, in a frame."""
    with TemporaryDirectory() as place:
        page = Results.load(folder).report(Path(place) / "report.html").read_text("utf-8")
    page = page.replace("<head>", '<head><base href="about:srcdoc">', 1)  # without it, its links lead to the notebook
    frame = f'<iframe srcdoc="{html.escape(page)}" style="width: 100%; height: {height}px; border: 0"></iframe>'
    return HTML(f"<div>{frame}</div>")


def short_name(path: Path) -> str:
    """Return a path for messages, relative to the repository if it is inside."""
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
