"""The command `report`: tables, plots and a page from result files.

python report.py results                        # a table per dataset and SAE
python report.py results --worst_first          # largest losses on top
python report.py results --resources            # seconds per stage and peak memory
python report.py results --csv all.csv          # every number of every probe, a line each, for a spreadsheet or pandas
python report.py results --rows gender --layer 4 --sae k8     # the rows that the SAE lost there
python report.py results --latents gender --layer 4 --sae k8  # the latents that carry the probe there
python report.py results --subgroups            # which people lose more: by length and frequency of the name
python report.py results --subgroups --people people.csv      # and by the columns of a table, such as year of birth
python report.py results -o report.html         # one page with everything, readable without a network
python report.py results --leaderboard board.html   # SAEs of a model and layer by rank, with ties: one page
python report.py results --push_to_hub OWNER/NAME --sae k8   # files, page and model card of an SAE on the Hub
python report.py results --plots plots          # every plot of that page as PNG and SVG, and its data as CSV
python report.py results --saebench out         # the same results as files of SAEBench 0.6
python report.py results --beside theirs.json   # files of SAEBench beside them; with -o in the page, with --plots drawn
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from delta_selectivity.cli.flags import with_flags
from delta_selectivity.cli.parser import Parser, user_path
from delta_selectivity.errors import RequestError
from delta_selectivity.records.saebench import Evaluation, read
from delta_selectivity.reporting.csv_file import write_csv
from delta_selectivity.reporting.groups import File
from delta_selectivity.reporting.results import load_all, result_files
from delta_selectivity.reporting.saebench import beside_text, own_evaluations, write
from delta_selectivity.reporting.tables import (
    overview,
    render,
    resource_table,
)
from delta_selectivity.system.terminal import show, show_status, tell


def main(argv: Sequence[str] | None = None, prog: str = "report.py") -> int:
    """Print tables or write the requested files, and return the exit code.

    The code is 2 if there is nothing to report, a file is not a result file (the others are still shown) or an output
    path cannot be written, and 1 if the tables cannot be printed.
    """
    try:
        asked = _parse(argv, prog)
        files, refused = load_all(path for folder in asked.folder for path in result_files(folder))
        for error in refused:
            tell(with_flags(f"error: {error}"))
        if not files:
            return 2
        beside = [read(path) for path in asked.beside or ()]
        if asked.saebench is not None:
            _write_saebench(files, asked.saebench)
            return 2 if refused else 0
        if asked.leaderboard is not None:
            from delta_selectivity.reporting.leaderboard import write_leaderboard

            show(with_flags(write_leaderboard(files, asked.leaderboard)))
            return 2 if refused else 0
        if asked.output is not None or asked.plots is not None:
            _write(files, beside, asked)
            return 2 if refused else 0
        if asked.push_to_hub is not None:
            _push(asked, files)
            return 2 if refused else 0
        if asked.csv is not None and asked.rows is None:
            _write_csv(files, asked.csv)
            return 2 if refused else 0
    except RequestError as error:
        tell(with_flags(f"error: {error}"))
        return 2
    try:
        if asked.rows is not None:
            return max(_rows(files, asked), 2 if refused else 0)
        if asked.latents is not None:
            return max(_latents(files, asked), 2 if refused else 0)
        if asked.subgroups:
            return max(_subgroups(files, asked), 2 if refused else 0)
        if beside:
            show(beside_text(own_evaluations(files), beside))
        else:
            _print(files, asked)
    except RequestError as error:
        tell(with_flags(f"error: {error}"))
        return 2
    except OSError as error:
        tell(f"failed: {error}")
        return 1
    return 2 if refused else 0


def _parse(argv: Sequence[str] | None, prog: str) -> Any:
    parser = Parser(prog, "Tables, plots and a page from the result files of main.py.", argument_default=None)
    path: dict[str, Any] = {"type": user_path, "metavar": "FILE"}
    parser.add_argument(
        "folder", **{**path, "metavar": "folder"}, nargs="*", default=[Path("results")],
        help="where the files are, or one file; several are put side by side (results)",
    )  # fmt: skip
    parser.add_argument("--worst_first", action="store_true", help="largest losses on top, not by layer")
    parser.add_argument("--summary", action="store_true", help="the line per SAE, and SAEs against each other, only")
    parser.add_argument("--resources", action="store_true", help="seconds per stage and peak memory only")
    parser.add_argument("--csv", **path, help="write every number to this file in place of tables")
    parser.add_argument("-o", "--output", **path, help="write one HTML page with tables and plots")
    parser.add_argument("--plots", **{**path, "metavar": "DIR"}, help="write each plot as PNG and SVG, its data as CSV")
    parser.add_argument("--leaderboard", **path, help="write one HTML page of SAEs by rank, for each model and layer")
    parser.add_argument(
        "--saebench", **{**path, "metavar": "DIR"}, help="write the results as files of SAEBench 0.6: core, and "
        "sparse_probing with --views ksparse of main.py"
    )  # fmt: skip
    parser.add_argument(
        "--beside", **path, nargs="+", help="put files of SAEBench (core, sparse_probing) beside the results: tables, "
        "with -o a part of the page, with --plots plots"
    )  # fmt: skip
    parser.add_argument(
        "--rows", metavar="PROBE", help="who was lost in one cell: counts, a histogram and the rows that lost most; "
        "with --layer and --sae where there are several, and --csv FILE for all rows (PROBE or DATASET/PROBE)"
    )  # fmt: skip
    parser.add_argument(
        "--latents", metavar="PROBE", help="which latents carry the model's probe in one cell; runs the model again "
        "over the texts, once; with --layer and --sae as for --rows"
    )  # fmt: skip
    parser.add_argument(
        "--subgroups", action="store_true", help="which people the SAEs lose more than others, over all cells: by "
        "length and frequency of the name"
    )  # fmt: skip
    parser.add_argument(
        "--people", **path, help="with --subgroups or -o: a CSV or TSV file with a column person (or name) and columns "
        "that group people; years and dates become decades"
    )  # fmt: skip
    parser.add_argument("--layer", type=int, help="of the cell")
    parser.add_argument("--sae", metavar="NAME", help="of the cell: its name, or what only its name holds, such as k8")
    parser.add_argument(
        "--push_to_hub", metavar="OWNER/NAME", help="write result files, page and model-index metadata of one SAE into "
        "this repository of the Hugging Face Hub, in one commit; with --sae where there are several"
    )  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="with --push_to_hub: show what it would write")
    asked = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if (asked.output or asked.plots) and (asked.csv or asked.worst_first or asked.summary or asked.resources):
        parser.error("-o and --plots write what there is: --csv and the flags of tables go without them")
    tabular = (asked.csv, asked.worst_first, asked.summary, asked.resources)
    if asked.saebench and any((asked.output, asked.plots, asked.beside, *tabular)):
        parser.error("--saebench writes files of SAEBench: other outputs go without it")
    if asked.beside and any(tabular):
        parser.error("--beside has tables of its own, or goes with -o and --plots")
    one_cell = [flag for flag in ("rows", "latents") if getattr(asked, flag) is not None]
    if asked.dry_run and asked.push_to_hub is None:
        parser.error("--dry_run goes with --push_to_hub")
    if not one_cell and (asked.layer is not None or (asked.sae is not None and asked.push_to_hub is None)):
        parser.error("--layer and --sae choose a cell: they go with --rows or --latents, --sae with --push_to_hub too")
    for flag in ("push_to_hub", "leaderboard"):
        rest = (value for name, value in vars(asked).items() if name not in ("folder", "sae", "dry_run", flag))
        if getattr(asked, flag) and any(rest):
            parser.error(f"--{flag} goes without other outputs")
    others = (*tabular[1:], asked.output, asked.plots, asked.saebench, asked.beside)
    if asked.subgroups and (any(others) or one_cell or asked.csv):
        parser.error("--subgroups is a table of its own: other outputs go without it (the page has it too)")
    if asked.people is not None and not (asked.subgroups or asked.output):
        parser.error("--people groups people: it goes with --subgroups or -o")
    if one_cell and (any(others) or len(one_cell) == 2 or (asked.csv and asked.latents)):
        parser.error(f"--{one_cell[-1]} is about one cell: other outputs go without it (--rows has --csv)")
    return asked


def _push(asked: Any, files: Sequence[File]) -> None:
    from delta_selectivity.api.hub import push

    show(str(push(files, asked.push_to_hub, asked.sae, dry_run=asked.dry_run)))


def _latents(files: Sequence[File], asked: Any) -> int:
    """Print the latents that carry the probe of one cell. Raises `RequestError` if they cannot be found."""
    from delta_selectivity.api.latents import latents_of
    from delta_selectivity.reporting.latent_tables import latents_text
    from delta_selectivity.reporting.rows import find_cell

    place = find_cell(files, asked.latents, asked.layer, asked.sae)
    show_status("looking for the latents: the model runs over the texts again")
    show(latents_text(latents_of(place), f"{place.probe}, layer {place.layer}"))
    return 0


def _subgroups(files: Sequence[File], asked: Any) -> int:
    """Print which people lose more. Raises `RequestError` if the table of people cannot be read."""
    from delta_selectivity.reporting.subgroup_table import subgroup_text

    show(subgroup_text(files, _people(asked)))
    return 0


def _people(asked: Any) -> dict[str, dict[str, str]]:
    """Read the groups of `--people`. Raises `RequestError` if they cannot be read."""
    from delta_selectivity.reporting.people_table import read_people  # deferred: tables do not need pandas

    return {} if asked.people is None else read_people(asked.people)


def _rows(files: Sequence[File], asked: Any) -> int:
    """Print or write the rows of one cell. Raises `RequestError` if the cell or its rows do not exist."""
    from delta_selectivity.reporting.row_tables import rows_text, write_rows  # deferred: tables do not need torch
    from delta_selectivity.reporting.rows import find_cell, rows_of

    place = find_cell(files, asked.rows, asked.layer, asked.sae)
    rows = rows_of(place)
    if asked.csv is None:
        show(rows_text(place, rows))
    else:
        with _written(asked.csv):
            write_rows(rows, asked.csv)
    return 0


def _print(files: Sequence[File], asked: Any) -> None:
    if asked.resources:
        show(resource_table(files))
    elif asked.summary:
        show(overview(files))
    else:
        show(render(files, asked.worst_first))


def _write_saebench(files: Sequence[File], folder: Path) -> None:
    """Write files in SAEBench's format. Raises `RequestError` if the folder cannot be written."""
    try:
        n = write(files, folder)
    except OSError as error:
        raise RequestError(f"`saebench` {folder}: cannot be written: {error.strerror or error}") from error
    show(f"{n} files of SAEBench in {folder}")


def _write_csv(files: Sequence[File], path: Path) -> None:
    with _written(path):
        write_csv(files, path)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Report a file that cannot be written as a wrong request."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"`csv` {path}: cannot be written: {error.strerror or error}") from error


def _write(files: Sequence[File], beside: Sequence[Evaluation], asked: Any) -> None:
    """Write the page, the plots, or both. Raises `RequestError` if a path cannot be written."""
    from delta_selectivity.reporting.output import write_page, write_plots  # deferred: tables do not need matplotlib
    from delta_selectivity.reporting.study import study_of

    study = study_of(files, beside)
    if asked.output is not None:
        show(with_flags(write_page(study, asked.output, _people(asked))))
    if asked.plots is not None:
        show(write_plots(study, asked.plots))
