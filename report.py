"""Tables from result files.

python report.py results                 # a table per dataset and SAE
python report.py results --worst_first   # largest losses on top
python report.py results --resources     # seconds per stage and peak memory
python report.py results --csv all.csv   # every number of every probe, a line each, for a spreadsheet or pandas
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import records
from errors import RequestError
from terminal import one_line, printable, show, tell
from whole_file import replacing

Row = tuple[str, ...]


def result_files(folder: Path) -> list[Path]:
    """Result files in the folder and one level below it (one folder per SAE), in order of name; a file is itself.

    Those of baselines follow.
    """
    if folder.is_file():
        return [folder]
    found = [sorted(folder.glob(pattern)) for pattern in ("*.json", "*/*.json", "baselines/*/*.json")]
    return [path for paths in (sorted(found[0] + found[1]), found[2]) for path in paths if path.name[0] != "."]


def cells(results: records.Json) -> Iterator[tuple[int, str, records.Json, records.Json]]:
    """(layer, probe, the layer's figures, the probe's result) in order of layers."""
    names = (name for name in results if name.startswith("layer_"))
    for name in sorted(names, key=lambda name: int(name.removeprefix("layer_"))):
        for probe, result in results[name].items():
            if isinstance(result, dict):
                yield int(name.removeprefix("layer_")), probe, results[name], result


def selectivity_table(results: records.Json, worst_first: bool = False) -> str:
    """layer, probe, model_sel, sae_sel, delta_sel with its 95 % interval, FVU and L0."""
    found = list(cells(results))
    if worst_first:
        found.sort(key=lambda cell: cell[3].get("delta_sel", 0.0) if cell[3].get("delta_sel") is not None else 0.0)
    header = ("layer", "probe", "model_sel", "sae_sel", "delta_sel", "95 % interval", "transfer", "FVU", "L0")
    return aligned([header, *(_row(*cell) for cell in found)])


def _row(layer: int, probe: str, figures: records.Json, result: records.Json) -> Row:
    if result.get("reason"):
        return (str(layer), probe, f"({result['reason']})", *[""] * 6)
    return (
        str(layer),
        probe,
        f"{result['model_sel']:.3f}",
        f"{result['sae_sel']:.3f}",
        f"{result['delta_sel']:+.3f}{_marks(result)}",
        f"{result['ci_low']:+.3f} .. {result['ci_high']:+.3f}",
        _number(result["transfer_sel"], ".3f"),
        _number(figures["fvu_pos"], ".3f"),
        _number(figures["l0"], ".1f"),
    )


def _marks(result: records.Json) -> str:
    lost_or_won = result.get("q_value") is not None and result["q_value"] < 0.05
    return f"{'*' if lost_or_won else ' '}{'=' if result.get('preserved') else ' '}"


def summary_table(files: Sequence[tuple[Path, records.Json]]) -> str:
    """A line per SAE: means over its datasets, layers and probes; delta_sel with its interval, people drawn once.

    Baselines come beneath the SAEs.
    """
    rows: list[Row] = [
        ("SAE", "probes x layers", "model_sel", "sae_sel", "delta_sel", "95 % interval", "lost (q < 0.05)", "preserved",
         "transfer_r2", "FVU", "L0")
    ]  # fmt: skip
    for name, own in by_sae(files).items():
        found = [(figures, result) for _, results in own for _, _, figures, result in cells(results)]
        measured = [(figures, result) for figures, result in found if not result.get("reason")]
        lost = sum(result["delta_sel"] < 0 and (result.get("q_value") or 0) < 0.05 for _, result in measured)
        preserved = sum(bool(result.get("preserved")) for _, result in measured)
        means = [_mean(result[key] for _, result in measured) for key in ("model_sel", "sae_sel", "delta_sel")]
        rows.append(
            (
                _label(name, own),
                str(len(measured)),
                _number(means[0], ".3f"),
                _number(means[1], ".3f"),
                _number(means[2], "+.4f"),
                _interval(_sae_level(own), "delta_sel"),
                f"{lost} of {len(measured)}",
                f"{preserved} of {len(measured)}",
                _number(_mean(result["transfer_r2"] for _, result in measured), ".3f"),
                _number(_mean(figures["fvu_pos"] for figures, _ in measured), ".3f"),
                _number(_mean(figures["l0"] for figures, _ in measured), ".1f"),
            )
        )
    return aligned(rows)


def by_sae(files: Sequence[tuple[Path, records.Json]]) -> dict[str, list[tuple[Path, records.Json]]]:
    """The files of each SAE, by the name that its user typed; those of each baseline after them."""
    found: dict[str, list[tuple[Path, records.Json]]] = {}
    for path, results in sorted(files, key=lambda file: is_baseline(file[1])):
        found.setdefault(results["_run"]["config"]["sae"], []).append((path, results))
    return found


def is_baseline(results: records.Json) -> bool:
    """Whether these results are no SAE's but something to compare it with."""
    return bool(results["_run"]["config"].get("baseline"))


def _label(name: str, files: Sequence[tuple[Path, records.Json]]) -> str:
    return name if is_baseline(files[0][1]) else records.slug(name)


def _sae_level(files: Sequence[tuple[Path, records.Json]]) -> records.Json:
    """What its files agree on about the SAE; empty if they were measured in runs that knew of different ones."""
    found = [results["_run"]["sae_level"] for _, results in files]
    return found[0] if all(level == found[0] for level in found) else {}


def comparison_table(files: Sequence[tuple[Path, records.Json]]) -> str | None:
    """SAEs from the best mean delta_sel to the worst, each against the next: paired by row, fold and person.

    Beneath them each baseline that belongs to an SAE against that one. None if no two were run together.
    """
    known = {name: own for name, own in by_sae(files).items() if _sae_level(own).get("delta_sel") is not None}
    scores = ("delta_sel", "transfer_r2")
    columns = [column for score in scores for column in (f"difference of {score}", "95 % interval", "p")]
    rows: list[Row] = [("SAE", "compared with", *columns)]
    for name, other in _pairs(known):
        found = _sae_level(known[name])["compared"].get(other)
        if found and found["delta_sel"] is not None:
            figures = [figure for score in scores for figure in _difference(found, score)]
            rows.append((_label(name, known[name]), records.slug(other), *figures))
    return aligned(rows) if len(rows) > 1 else None


def _difference(found: records.Json, score: str) -> Row:
    return (
        _number(found[score], "+.4f"),
        _interval(found, score),
        _p_value(found[f"{score}_p_value"]),
    )


def _p_value(p: float | None) -> str:
    return "< 1e-99" if p is not None and p < 1e-99 else _number(p, ".1e")


def _pairs(known: Mapping[str, Sequence[tuple[Path, records.Json]]]) -> Iterator[tuple[str, str]]:
    """Which names `comparison_table` compares."""
    saes = [name for name, own in known.items() if not is_baseline(own[0][1])]
    yield from itertools.pairwise(sorted(saes, key=lambda name: -_sae_level(known[name])["delta_sel"]))
    for name, own in known.items():
        owner = own[0][1]["_run"]["config"].get("baseline_of")
        yield from ((name, sae) for sae in saes if records.slug(sae) == owner)


def _interval(found: records.Json, score: str) -> str:
    if found.get(f"{score}_ci_low") is None:
        return "-"
    return f"{found[f'{score}_ci_low']:+.4f} .. {found[f'{score}_ci_high']:+.4f}"


def resource_table(files: Sequence[tuple[Path, records.Json]]) -> str:
    """Seconds per stage and peak memory of the run that wrote the newest of the files.

    `total` is the wall clock; the stages of the two threads overlap, so their seconds add up to more.
    """
    run = max(
        (results["_run"] for _, results in files), key=lambda run: (run["started"], run["seconds"].get("total", 0))
    )
    rows: list[Row] = [("stage", "seconds")]
    rows += [(name, f"{seconds:.1f}") for name, seconds in run["seconds"].items()]
    rows += [(name, f"{value:.2f}") for name, value in run["resources"].items()]
    return aligned(rows)


def aligned(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table whose columns line up in a terminal; the first two columns to the left.

    Names come from data: what would break the table or the terminal is escaped.
    """
    rows = [tuple(printable(cell).replace("|", "\\|") for cell in row) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i < 2 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def render(files: Sequence[tuple[Path, records.Json]], worst_first: bool = False) -> str:
    """Every table of the files, and the summary over several last, where a terminal leaves the eye.

    Of baselines only the summary, unless there is nothing else.
    """
    in_full = [file for file in files if not is_baseline(file[1])] or files
    parts = [f"{one_line(str(path))}\n\n{selectivity_table(results, worst_first)}" for path, results in in_full]
    note = (
        "delta_sel: 0 = preserved, negative = lost; intervals are clustered by person\n"
        "* after it: q < 0.05 (Benjamini-Hochberg over all that the run measured of the SAE)\n"
        "= after it: shown to be preserved, the 90 % interval lies within +-epsilon"
    )
    return "\n\n".join([*parts, note, *([overview(files)] if len(files) > 1 else [])])


def overview(files: Sequence[tuple[Path, records.Json]]) -> str:
    """The line per SAE, and the SAEs against each other."""
    return "\n\n".join(table for table in (summary_table(files), comparison_table(files)) if table)


def write_csv(files: Sequence[tuple[Path, records.Json]], path: Path) -> None:
    """A line for each SAE, dataset file, layer and probe, with all figures of the layer and of the probe.

    Names come from data: one that a spreadsheet would take for a formula gets an apostrophe before it. Raises OSError.
    """
    lines = []
    for file, results in files:
        about = {"sae": results["_run"]["config"]["sae"], "file": file.stem}
        for layer, probe, figures, result in cells(results):
            own = {name: value for name, value in figures.items() if not isinstance(value, dict)}
            lines.append({**about, "layer": layer, "probe": probe, **own, **result})
    columns = list(dict.fromkeys(name for line in lines for name in line))
    with replacing(path.absolute(), "w", encoding="utf-8") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(columns)
        table.writerows([_plain(line.get(name)) for name in columns] for line in lines)


def _plain(value: Any) -> Any:
    """A cell that is what it looks like, in a spreadsheet too."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def load(paths: Iterable[Path]) -> list[tuple[Path, records.Json]]:
    """The files, each checked. Raises `RequestError` if there is none, or one is no result file."""
    files = [(path, records.read(path)) for path in paths]
    if not files:
        raise RequestError("no result files found: run main.py first, or name its --output_directory")
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; 2 if there is nothing to print, 1 if it cannot be printed."""
    parser = argparse.ArgumentParser(description="Tables from the result files of main.py.")
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("results"), help="where the files are, or one file (%(default)s)"
    )
    parser.add_argument("--worst_first", action="store_true", help="largest losses on top, not by layer")
    parser.add_argument("--summary", action="store_true", help="the line per SAE, and SAEs against each other, only")
    parser.add_argument("--resources", action="store_true", help="seconds per stage and peak memory only")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every number to this file in place of tables")
    asked: Any = parser.parse_args(argv)
    try:
        files = load(result_files(asked.folder))
    except RequestError as error:
        tell(f"error: {error}")
        return 2
    try:
        if asked.csv is not None:
            write_csv(files, asked.csv)
        elif asked.resources:
            show(resource_table(files))
        elif asked.summary:
            show(overview(files))
        else:
            show(render(files, asked.worst_first))
    except OSError as error:
        tell(f"failed: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
