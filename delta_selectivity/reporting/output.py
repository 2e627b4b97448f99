"""Write the page, or the plots with their data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from delta_selectivity.errors import RequestError
from delta_selectivity.reporting.page import page
from delta_selectivity.reporting.plots import plots_of
from delta_selectivity.reporting.row_data import packed
from delta_selectivity.reporting.rows import RowsReader
from delta_selectivity.reporting.study import Study
from delta_selectivity.reporting.subgroup_lines import By
from delta_selectivity.reporting.subgroup_table import subgroup_section
from delta_selectivity.system.whole_file import replacing

MAX_BYTES = 5_000_000  # maximum bytes of a page; larger ones omit download links for plots, then compress the plots
MIN_ROWS_BYTES = 500_000  # minimum bytes reserved for rows, whatever the size of the rest of the page


def write_page(study: Study, path: Path, by: By | None = None, *, with_rows: bool = True) -> str:
    """Write the page atomically; returns a message.

    Args:
        study: The SAEs to report on.
        path: The HTML file.
        by: Further subgroups of people, besides those by length and frequency of the name.
        with_rows: Include the rows of the cells, with their texts if they are stored.

    Raises:
        RequestError: The path is not writable.
    """
    with _naming("`page`", path), replacing(path.absolute(), "w", encoding="utf-8") as out:
        plots = plots_of(study)
        drawn = {plot.name: plot.svg() for plot in plots}
        read = RowsReader(fetch=False)
        groups = subgroup_section(study, by or {}, read)
        for with_links, pack_plots in ((True, False), (False, False), (False, True)):
            n_bytes = len(page(study, plots, drawn, with_links, groups, pack_plots=pack_plots).encode())
            if n_bytes <= MAX_BYTES:
                break
        rows = packed(study, max(MAX_BYTES - n_bytes, MIN_ROWS_BYTES), read) if with_rows else None
        out.write(page(study, plots, drawn, with_links, groups, rows, pack_plots))
    unlinked = (
        "" if with_links else "; the page is too large for download links of its plots: use `plots` to write them"
    )
    return f"report: {path} ({path.stat().st_size / 1e6:.1f} MB){unlinked}"


def write_plots(study: Study, folder: Path) -> str:
    """Write every plot as PNG and SVG, and its data as CSV. Raises `RequestError` if that fails."""
    with _naming("`plots`", folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = []
        for plot in plots_of(study):
            names.append(plot.name)
            for ending, content in (("svg", plot.svg().encode()), ("png", plot.png()), ("csv", plot.csv().encode())):
                with replacing(folder / f"{plot.name}.{ending}", "wb") as out:
                    out.write(content)
    return f"plots: {len(names)} in {folder}, each as SVG, PNG and CSV"


@contextmanager
def _naming(flag: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RequestError(f"{flag} {path}: cannot be written: {error.strerror or error}") from error
