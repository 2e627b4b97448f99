"""Results as CSV, one line per probe."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from delta_selectivity.records.result_file import Json
from delta_selectivity.records.verdicts import verdict
from delta_selectivity.reporting.groups import File, model_names
from delta_selectivity.reporting.results import about_file, cells
from delta_selectivity.system.terminal import printable
from delta_selectivity.system.whole_file import replacing

FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
"""First characters that make a spreadsheet read a cell as a formula; some spreadsheets also accept full-width signs."""


def write_csv(files: Sequence[File], path: Path) -> None:
    """Write one line for each SAE, file, layer and probe: settings, and all figures of the layer and of the probe.

    A name that a spreadsheet would read as a formula is prefixed with an apostrophe. Raises OSError.
    """
    lines = []
    models = model_names(files)
    for file, results in files:
        about, settings = about_file((file, results), models)
        for layer, probe, figures, result in cells(results):
            place = {**about, "file": file.stem, "layer": layer, "probe": probe}
            lines.append({**place, **settings, **_numbers(figures), **result, "verdict": verdict(result)})
    _write(lines, path)


def write_rows_csv(path: Path, results: Json) -> None:
    """Write one line for each SAE and probe of a file of rows: SAE -> figures, and probe -> record. Raises OSError."""
    lines = [
        {"sae": sae, "probe": probe, **_numbers(figures), **result}
        for sae, figures in results.items()
        if sae != "_run"
        for probe, result in figures.items()
        if isinstance(result, dict)
    ]
    _write(lines, path)


def _numbers(figures: Json) -> Json:
    """Return the figures of a layer, without its probes."""
    return {name: value for name, value in figures.items() if not isinstance(value, dict)}


def _write(lines: Sequence[Json], path: Path) -> None:
    columns = list(dict.fromkeys(name for line in lines for name in line))
    with replacing(path.absolute(), "w", encoding="utf-8") as out:
        out.write(csv_text(columns, ([line.get(name) for name in columns] for line in lines)))


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a header and a line for each row; None is empty, numbers have full precision."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(map(_plain, columns))
    table.writerows(map(_plain, row) for row in rows)
    return out.getvalue()


def _plain(value: Any) -> Any:
    """Return a cell's value so that a spreadsheet shows it unchanged."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text
