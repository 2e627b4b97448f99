"""Entry and exit of every program: signal handlers first, then slow imports, and an exit code at the end."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from delta_selectivity.system import interrupts
from delta_selectivity.system.startup import limit_primitive_cache, pause_garbage_collection

CONSOLE = "delta-selectivity"


class Command(NamedTuple):
    """A subcommand of the console command, which is also a file at the top of a clone."""

    module: str  # in `delta_selectivity.cli`; its `main(argv, prog)` returns the exit code
    file: str
    help: str


COMMANDS = {
    "run": Command("main", "main.py", "measure SAEs: everything from texts to result files and tables"),
    "tasks": Command("tasks", "datasets_wikidata.py", "list the tasks with rows and class balance; export their rows"),
    "inspect": Command("inspect", "sae_loader.py", "describe an SAE, and find where in a model it fits"),
    "extract": Command(
        "extract", "activations.py", "write activations and reconstructions of the probed rows to a file"
    ),
    "probe": Command("probe", "probes.py", "measure a file of activations and reconstructions from any source"),
    "scale": Command("scale", "compute_selectivity.py", "measure SAEs with many workers, or run many requests"),
    "report": Command("report", "report.py", "print tables, and write plots and pages, from result files"),
}


def main() -> NoReturn:
    """Run the console command `delta-selectivity` with a subcommand and its arguments, and end the process."""
    interrupts.exit_on_signals()
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        start(command, arguments, f"{CONSOLE} {command}")
    from delta_selectivity.system.terminal import show, show_on_stderr  # after the signal handlers: this import is slow

    if command in {"-h", "--help"}:
        lines = (f"  {name:8} {known.help}" for name, known in COMMANDS.items())
        show("\n".join([f"usage: {CONSOLE} COMMAND ...", "", *lines, "", "Each command has its own --help."]))
        interrupts.exit_now(0)
    if command == "--version":
        from delta_selectivity.system.provenance import program_version

        show(f"{CONSOLE} {program_version()}")
        interrupts.exit_now(0)
    show_on_stderr(f"error: unknown command {command!r}: choose from {', '.join(COMMANDS)}")
    interrupts.exit_now(2)


def start(command: str, arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Run a subcommand and end the process.

    Args:
        command: A key of `COMMANDS`.
        arguments: Its arguments; None for those of this process.
        prog: The program's name in its help; None for the name of its file in a clone.
    """
    interrupts.exit_on_signals()  # before the imports below, which take 0.1 s
    pause_garbage_collection()
    limit_primitive_cache()
    module = importlib.import_module(f"delta_selectivity.cli.{COMMANDS[command].module}")
    code = module.main(sys.argv[1:] if arguments is None else arguments, prog or COMMANDS[command].file)
    if command == "scale":
        from multiprocessing import util

        util._exit_function()  # type: ignore[attr-defined]  # `exit_now` skips this; else the tracker warns
    interrupts.exit_now(code)


def results_message(output: Path, prog: str) -> str:
    """Return the last line of a run: where its results are and how to view them."""
    report = f"{command_text('report', prog)} {shlex.quote(str(output))} -o report.html"
    return f"results in {output}; for an HTML page: {report}"


def command_text(command: str, prog: str) -> str:
    """Return the text of a command, in the form (installed or in a clone) in which the program `prog` was started."""
    return f"{CONSOLE} {command}" if prog.startswith(f"{CONSOLE} ") else f"python {COMMANDS[command].file}"
