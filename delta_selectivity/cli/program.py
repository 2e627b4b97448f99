"""Start and end of every program: signals and garbage collection first, heavy imports after, an exit code last."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from delta_selectivity.system import interrupts
from delta_selectivity.system.startup import hold_collector
from delta_selectivity.system.terminal import show, tell

COMMANDS = {
    "run": "delta_selectivity.cli.main",
    "scale": "delta_selectivity.cli.scale",
    "report": "delta_selectivity.cli.report",
}
"""Subcommand -> the module whose `main(argv)` gives the exit code."""


def main() -> NoReturn:
    """Run the console command `delta-selectivity`: a subcommand and its arguments. End the process."""
    interrupts.leave_at_once()
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        start(command, arguments)
    subcommands = ", ".join(COMMANDS)
    if command in {"-h", "--help"}:
        show(f"usage: delta-selectivity COMMAND ...\n\ncommands: {subcommands}; each of them knows --help")
        interrupts.leave(0)
    tell(f"error: there is no command {command!r}: choose from {subcommands}")
    interrupts.leave(2)


def start(command: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a subcommand with these arguments (None: this process's own), and end the process."""
    interrupts.leave_at_once()  # before the imports below, which take a tenth of a second
    hold_collector()
    code = importlib.import_module(COMMANDS[command]).main(sys.argv[1:] if arguments is None else arguments)
    if command == "scale":
        from multiprocessing import util

        util._exit_function()  # type: ignore[attr-defined]  # what `leave` leaves out: else a tracker of queues complains
    interrupts.leave(code)
