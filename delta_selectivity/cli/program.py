"""How every program starts and ends: signals and memory first, the heavy imports after, an exit code last."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

from delta_selectivity.system import interrupts
from delta_selectivity.system.startup import hold_collector

COMMANDS = {
    "run": "delta_selectivity.cli.main",
    "scale": "delta_selectivity.cli.scale",
    "report": "delta_selectivity.cli.report",
}
"""Subcommand -> the module whose `main(argv)` gives the exit code."""


def start(command: str) -> NoReturn:
    """Run a subcommand with this process's arguments, and end the process."""
    interrupts.leave_at_once()  # before the imports below, which take a tenth of a second
    hold_collector()
    code = importlib.import_module(COMMANDS[command]).main(sys.argv[1:])
    if command == "scale":
        from multiprocessing import util

        util._exit_function()  # type: ignore[attr-defined]  # what `leave` leaves out: else a tracker of queues complains
    interrupts.leave(code)
