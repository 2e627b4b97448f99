"""The command `run`: measure SAEs layer by layer, and turn what happens into an exit code.

    python main.py                 # the bundled demo: tiny-pythia, its SAEs, the Wikidata tasks
    python main.py --help

This file wires the parts together and turns what happens into an exit code: 0 all is on disk, 1 the run failed,
2 the request was wrong, 130 interrupted. Imports that cost seconds wait until they are needed.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence

from delta_selectivity.cli.flags import with_flags
from delta_selectivity.errors import RequestError
from delta_selectivity.system.interrupts import like_ctrl_c
from delta_selectivity.system.terminal import LineFormatter, show, tell

log = logging.getLogger("delta_selectivity")

GOES_ON = "finished layers are on disk; the same command goes on from there"
ERROR_SHOWN = 400  # characters of an error in its line: torch appends its C++ stack


def run(argv: Sequence[str]) -> None:
    """One run. Raises `RequestError` if the request is wrong, anything else if the run fails."""
    from delta_selectivity.cli.command_line import parse

    asked = parse(argv)
    logging.getLogger().setLevel(logging.INFO if asked.verbose else logging.WARNING)
    if asked.job == "inspect":
        from delta_selectivity.run.inspection import inspect

        for part in inspect(asked.request):
            show(part)
    elif asked.job == "list":
        from delta_selectivity.tasks import describe_datasets

        show(describe_datasets(asked.request.tasks))
    else:
        from delta_selectivity.api.evaluate import evaluate
        from delta_selectivity.reporting import tables

        request = asked.request
        results = evaluate(
            request.model,
            request.saes,
            request.tasks,
            layers=request.layers,
            settings=request.settings,
            device=(request.device1, request.device2),
            output=request.output,
            cache=request.cache,
            progress=not asked.quiet,
        )
        if not asked.quiet:
            show(tables.render(results.files))


def _foreseen(error: Exception) -> bool:
    """Whether the error's own line says enough: disk, memory, NaN."""
    from delta_selectivity.run.row_store import NonFiniteError
    from delta_selectivity.system.out_of_memory import is_out_of_memory

    return isinstance(error, OSError | NonFiniteError) or is_out_of_memory(error)


def main(argv: Sequence[str] | None = None, job: Callable[[Sequence[str]], None] | None = None) -> int:
    """Run (or do another job with the arguments), and say in one line on stderr what went wrong if something did.

    Returns the exit code.

    An error that nobody foresaw comes with its traceback, that of the thread where it happened; one of disk, memory
    or numbers only with `--verbose`.
    """
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(LineFormatter(with_flags))
    logging.basicConfig(level=logging.WARNING, handlers=[to_stderr])
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    try:
        with like_ctrl_c():
            (job or run)(sys.argv[1:] if argv is None else argv)
    except RequestError as error:
        tell(with_flags(f"error: {error}"))
        return 2
    except KeyboardInterrupt:
        tell(f"interrupted: {GOES_ON}")
        return 130
    except Exception as error:
        log.log(logging.INFO if _foreseen(error) else logging.ERROR, "where it failed", exc_info=error)
        tell(f"failed: {type(error).__name__}: {str(error)[:ERROR_SHOWN]}; {GOES_ON}")
        return 1
    return 0
