"""The command `tasks`: lists the tasks and exports their rows.

python datasets_wikidata.py                                            # a line per probe
python datasets_wikidata.py --dataset_file my_concept.csv              # the same for your own table
python datasets_wikidata.py --datasets gender --export gender.csv      # for `--dataset_file gender.csv`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from delta_selectivity.cli.command_line import TASK_FLAGS, add_flags, add_verbose, make_tasks, parse_values
from delta_selectivity.cli.guard import guarded, set_log_level
from delta_selectivity.cli.parser import Parser, user_path
from delta_selectivity.cli.program import command_text
from delta_selectivity.errors import RequestError
from delta_selectivity.system.terminal import show

EXAMPLES = """\
examples:
  {tasks}
      list rows, groups and class balance of the Wikidata tasks
  {tasks} --datasets sae-probes
      list the 113 binary tasks of sae-probes
  {tasks} --datasets gender --export gender.csv
  {run} --dataset_file gender.csv
      write the rows of a task to a table, and run on that table: the texts, labels and groups are the same
"""

DRAW_FLAGS = ("shuffle_select_n", "seed")
MORE_TASKS = (
    "--datasets sae-probes lists the 113 binary tasks of sae-probes, --datasets all adds tasks with several classes"
)


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Build the parser of this command."""
    examples = EXAMPLES.format(tasks=command_text("tasks", prog), run=command_text("run", prog))
    parser = Parser(prog, "List the available tasks, or write the rows of tasks to a file.", epilog=examples)
    add_flags(parser, only=(*TASK_FLAGS, *DRAW_FLAGS), exclude=("list_datasets",))
    parser.add_argument(
        "--export", type=user_path, metavar="FILE", help="write a line per row and probe to this .csv, .jsonl or "
        ".parquet file, in the columns that --dataset_file reads; --shuffle_select_n limits the number of rows",
    )  # fmt: skip
    add_verbose(parser)
    return parser


def run(argv: Sequence[str], prog: str) -> None:
    """Print the table or write rows. Raises `RequestError` if the request is wrong."""
    values = parse_values(argv, build_parser(prog))
    set_log_level(bool(values.get("verbose")))
    path: Path | None = values.get("export")
    if path is None and (given := [name for name in DRAW_FLAGS if name in values]):
        raise RequestError(f"`{given[0]}` selects the rows to export, but `export` is missing")
    from delta_selectivity.settings import Settings
    from delta_selectivity.tasks import describe_datasets, load_probe_texts
    from delta_selectivity.tasks.export import export_rows

    tasks = make_tasks(values)
    if path is None:
        show(describe_datasets(tasks))
        if not any(values.get(name) for name in ("datasets", "dataset_file")):
            show(MORE_TASKS)
        return
    settings = Settings(**{name: values[name] for name in DRAW_FLAGS if name in values})
    n = export_rows(load_probe_texts(tasks, shuffle_select_n=settings.shuffle_select_n, seed=settings.seed), path)
    show(f"wrote {path}: {n} rows")


def main(argv: Sequence[str] | None = None, prog: str = "datasets_wikidata.py") -> int:
    """Run the command and return its exit code."""
    return guarded(argv, lambda arguments: run(arguments, prog))
