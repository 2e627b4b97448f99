"""The command `report`: tables, plots and a page from result files.

python report.py results                        # a table per dataset and SAE
python report.py results --worst_first          # the same tables, largest losses first
python report.py results --resources            # seconds per stage and peak memory
python report.py results --csv all.csv          # every number, one line per probe, for a spreadsheet or pandas
python report.py results --rows gender --layer 4 --sae k8     # the rows that the SAE lost in one cell
python report.py results --latents gender --layer 4 --sae k8  # the latents that carry the probe in one cell
python report.py results --subgroups            # losses of people by length and frequency of the name
python report.py results --subgroups --people people.csv      # also by the columns of a table, such as year of birth
python report.py results -o report.html         # one self-contained page with everything
python report.py results --leaderboard board.html   # one page that ranks the SAEs of each model and layer
python report.py results --push_to_hub OWNER/NAME --sae k8   # publish files, page and model card of an SAE on the Hub
python report.py results --plots plots          # every plot of the page as PNG and SVG, and its data as CSV
python report.py results --saebench out         # the results in the file format of SAEBench 0.6
python report.py results --beside theirs.json   # compare with files of SAEBench; also for -o and --plots
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
from delta_selectivity.system.terminal import show, show_on_stderr, show_status


def main(argv: Sequence[str] | None = None, prog: str = "report.py") -> int:
    """Print tables or write the requested files, and return the exit code.

    The code is 2 if there is nothing to report, a file is not a result file (the others are still shown) or an output
    path cannot be written, and 1 if the tables cannot be printed.
    """
    try:
        arguments = _parse(argv, prog)
        files, errors = load_all(path for folder in arguments.folder for path in result_files(folder))
        for error in errors:
            show_on_stderr(with_flags(f"error: {error}"))
        if not files:
            return 2
        beside = [read(path) for path in arguments.beside or ()]
        if arguments.saebench is not None:
            _write_saebench(files, arguments.saebench)
            return 2 if errors else 0
        if arguments.leaderboard is not None:
            from delta_selectivity.reporting.leaderboard import write_leaderboard

            show(with_flags(write_leaderboard(files, arguments.leaderboard)))
            return 2 if errors else 0
        if arguments.output is not None or arguments.plots is not None:
            _write(files, beside, arguments)
            return 2 if errors else 0
        if arguments.push_to_hub is not None:
            _push(arguments, files)
            return 2 if errors else 0
        if arguments.csv is not None and arguments.rows is None:
            _write_csv(files, arguments.csv)
            return 2 if errors else 0
    except RequestError as error:
        show_on_stderr(with_flags(f"error: {error}"))
        return 2
    try:
        if arguments.rows is not None:
            return max(_rows(files, arguments), 2 if errors else 0)
        if arguments.latents is not None:
            return max(_latents(files, arguments), 2 if errors else 0)
        if arguments.subgroups:
            return max(_subgroups(files, arguments), 2 if errors else 0)
        if beside:
            show(beside_text(own_evaluations(files), beside))
        else:
            _print(files, arguments)
    except RequestError as error:
        show_on_stderr(with_flags(f"error: {error}"))
        return 2
    except OSError as error:
        show_on_stderr(f"failed: {error}")
        return 1
    return 2 if errors else 0


def _parse(argv: Sequence[str] | None, prog: str) -> Any:
    parser = Parser(
        prog, "Print tables, and write plots and pages, from the result files of main.py.", argument_default=None
    )
    path: dict[str, Any] = {"type": user_path, "metavar": "FILE"}
    parser.add_argument(
        "folder", **{**path, "metavar": "folder"}, nargs="*", default=[Path("results")],
        help="folder of result files, or one file; several are combined (results)",
    )  # fmt: skip
    parser.add_argument("--worst_first", action="store_true", help="sort by loss, largest first, instead of by layer")
    parser.add_argument("--summary", action="store_true", help="print only a line per SAE and comparisons of SAEs")
    parser.add_argument("--resources", action="store_true", help="print only seconds per stage and peak memory")
    parser.add_argument("--csv", **path, help="write every number to this file instead of printing tables")
    parser.add_argument("-o", "--output", **path, help="write one HTML page with tables and plots")
    parser.add_argument("--plots", **{**path, "metavar": "DIR"}, help="write each plot as PNG and SVG, its data as CSV")
    parser.add_argument("--leaderboard", **path, help="write one HTML page that ranks the SAEs of each model and layer")
    parser.add_argument(
        "--saebench", **{**path, "metavar": "DIR"}, help="write the results in the file format of SAEBench 0.6: core, "
        "and sparse_probing for results of main.py --views ksparse"
    )  # fmt: skip
    parser.add_argument(
        "--beside", **path, nargs="+", help="compare the results with files of SAEBench (core, sparse_probing): print "
        "tables; with -o, add a section to the page; with --plots, write plots"
    )  # fmt: skip
    parser.add_argument(
        "--rows", metavar="PROBE", help="print the rows of one cell (PROBE or DATASET/PROBE): counts by outcome, a "
        "histogram, and the largest losses. --layer and --sae select the cell; --csv FILE writes all rows"
    )  # fmt: skip
    parser.add_argument(
        "--latents", metavar="PROBE", help="print the latents that carry the model's probe in one cell. The first call "
        "runs the model over the texts again. --layer and --sae select the cell"
    )  # fmt: skip
    parser.add_argument(
        "--subgroups", action="store_true", help="print the losses of subgroups of people compared with all others, "
        "over all cells: by length and frequency of the name"
    )  # fmt: skip
    parser.add_argument(
        "--people", **path, help="for --subgroups or -o: a CSV or TSV file with a column person (or name) and columns "
        "that define further subgroups; years and dates become decades"
    )  # fmt: skip
    parser.add_argument("--layer", type=int, help="for --rows and --latents: layer of the cell")
    parser.add_argument(
        "--sae", metavar="NAME", help="for --rows, --latents and --push_to_hub: name of the SAE, or a unique part of "
        "it, such as k8"
    )  # fmt: skip
    parser.add_argument(
        "--push_to_hub", metavar="OWNER/NAME", help="publish the result files, the page and a model card of one SAE in "
        "this repository of the Hugging Face Hub, in one commit. --sae selects the SAE"
    )  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="for --push_to_hub: print what would be written")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if (arguments.output or arguments.plots) and (
        arguments.csv or arguments.worst_first or arguments.summary or arguments.resources
    ):
        parser.error("-o and --plots cannot be combined with --csv and the flags of tables")
    table_flags = (arguments.csv, arguments.worst_first, arguments.summary, arguments.resources)
    if arguments.saebench and any((arguments.output, arguments.plots, arguments.beside, *table_flags)):
        parser.error("--saebench cannot be combined with other outputs")
    if arguments.beside and any(table_flags):
        parser.error("--beside prints its own tables, and can be combined only with -o and --plots")
    cell_flags = [flag for flag in ("rows", "latents") if getattr(arguments, flag) is not None]
    if arguments.dry_run and arguments.push_to_hub is None:
        parser.error("--dry_run needs --push_to_hub")
    if not cell_flags and (
        arguments.layer is not None or (arguments.sae is not None and arguments.push_to_hub is None)
    ):
        parser.error("--layer needs --rows or --latents; --sae needs --rows, --latents or --push_to_hub")
    for flag in ("push_to_hub", "leaderboard"):
        other_values = (
            value for name, value in vars(arguments).items() if name not in ("folder", "sae", "dry_run", flag)
        )
        if getattr(arguments, flag) and any(other_values):
            parser.error(f"--{flag} cannot be combined with other outputs")
    other_outputs = (*table_flags[1:], arguments.output, arguments.plots, arguments.saebench, arguments.beside)
    if arguments.subgroups and (any(other_outputs) or cell_flags or arguments.csv):
        parser.error("--subgroups cannot be combined with other outputs; the page includes its table")
    if arguments.people is not None and not (arguments.subgroups or arguments.output):
        parser.error("--people needs --subgroups or -o")
    if cell_flags and (any(other_outputs) or len(cell_flags) == 2 or (arguments.csv and arguments.latents)):
        parser.error(f"--{cell_flags[-1]} cannot be combined with other outputs, except --rows with --csv")
    return arguments


def _push(arguments: Any, files: Sequence[File]) -> None:
    from delta_selectivity.api.hub import push

    show(str(push(files, arguments.push_to_hub, arguments.sae, dry_run=arguments.dry_run)))


def _latents(files: Sequence[File], arguments: Any) -> int:
    """Print the latents that carry the probe of one cell. Raises `RequestError` if they cannot be found."""
    from delta_selectivity.api.latents import latents_of
    from delta_selectivity.reporting.latent_tables import latents_text
    from delta_selectivity.reporting.rows import find_cell

    place = find_cell(files, arguments.latents, arguments.layer, arguments.sae)
    show_status("running the model over the texts again")
    show(latents_text(latents_of(place), f"{place.probe}, layer {place.layer}"))
    return 0


def _subgroups(files: Sequence[File], arguments: Any) -> int:
    """Print the losses of subgroups. Raises `RequestError` if the table of people cannot be read."""
    from delta_selectivity.reporting.subgroup_table import subgroup_text

    show(subgroup_text(files, _people(arguments)))
    return 0


def _people(arguments: Any) -> dict[str, dict[str, str]]:
    """Read the groups of `--people`. Raises `RequestError` if they cannot be read."""
    from delta_selectivity.reporting.people_table import read_people  # deferred: tables do not need pandas

    return {} if arguments.people is None else read_people(arguments.people)


def _rows(files: Sequence[File], arguments: Any) -> int:
    """Print or write the rows of one cell. Raises `RequestError` if the cell or its rows do not exist."""
    from delta_selectivity.reporting.row_tables import rows_text, write_rows  # deferred: tables do not need torch
    from delta_selectivity.reporting.rows import find_cell, rows_of

    place = find_cell(files, arguments.rows, arguments.layer, arguments.sae)
    rows = rows_of(place)
    if arguments.csv is None:
        show(rows_text(place, rows))
    else:
        with _naming_csv(arguments.csv):
            write_rows(rows, arguments.csv)
    return 0


def _print(files: Sequence[File], arguments: Any) -> None:
    if arguments.resources:
        show(resource_table(files))
    elif arguments.summary:
        show(overview(files))
    else:
        show(render(files, arguments.worst_first))


def _write_saebench(files: Sequence[File], folder: Path) -> None:
    """Write files in SAEBench's format. Raises `RequestError` if the folder cannot be written."""
    try:
        n = write(files, folder)
    except OSError as error:
        raise RequestError(f"`saebench` {folder}: cannot be written: {error.strerror or error}") from error
    show(f"{n} files of SAEBench in {folder}")


def _write_csv(files: Sequence[File], path: Path) -> None:
    with _naming_csv(path):
        write_csv(files, path)


@contextmanager
def _naming_csv(path: Path) -> Iterator[None]:
    """Report a file that cannot be written as a wrong request."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"`csv` {path}: cannot be written: {error.strerror or error}") from error


def _write(files: Sequence[File], beside: Sequence[Evaluation], arguments: Any) -> None:
    """Write the page, the plots, or both. Raises `RequestError` if a path cannot be written."""
    from delta_selectivity.reporting.output import write_page, write_plots  # deferred: tables do not need matplotlib
    from delta_selectivity.reporting.study import study_of

    study = study_of(files, beside)
    if arguments.output is not None:
        show(with_flags(write_page(study, arguments.output, _people(arguments))))
    if arguments.plots is not None:
        show(write_plots(study, arguments.plots))
