"""Exit codes of commands: 0 done, 1 failed, 2 wrong request, 130 interrupted."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from delta_selectivity.cli.flags import with_flags
from delta_selectivity.errors import RequestError
from delta_selectivity.system.interrupts import as_keyboard_interrupt
from delta_selectivity.system.terminal import NOTE, LineFormatter, show_on_stderr

log = logging.getLogger("delta_selectivity")

RESUMES = "finished layers are on disk; the same command goes on from there"
NOTHING_WRITTEN = "nothing was written"
ERROR_SHOWN = 400  # maximum characters of an error message: torch appends its C++ stack


def describe_saved_results(outputs: Sequence[Path]) -> str:
    """Describe what a failed or interrupted run leaves on disk. outputs: its folders; none if it writes no results."""
    missing = [folder for folder in outputs if not folder.is_dir()]
    if missing:
        return f"there are no results: the folder {missing[0]} does not exist"
    return RESUMES if outputs else NOTHING_WRITTEN


def guarded(
    argv: Sequence[str] | None,
    job: Callable[[Sequence[str]], None],
    left: Callable[[], str] = lambda: NOTHING_WRITTEN,
) -> int:
    """Run a job and report errors in one line on stderr.

    Args:
        argv: Arguments of the job; None for those of this process.
        job: Raises `RequestError` if the request is wrong, other errors if it fails.
        left: Describes what a failed or interrupted job leaves on disk.

    Returns:
        The exit code. Unexpected errors are logged with the traceback of their thread; for disk, memory and numerical
        errors the traceback is shown with `--verbose` only.
    """
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(LineFormatter(with_flags))
    logging.basicConfig(level=NOTE, handlers=[to_stderr])
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    try:
        with as_keyboard_interrupt():
            job(sys.argv[1:] if argv is None else argv)
    except RequestError as error:
        show_on_stderr(with_flags(f"error: {error}"))
        return 2
    except KeyboardInterrupt:
        show_on_stderr(f"interrupted: {left()}")
        return 130
    except Exception as error:
        log.log(logging.INFO if _is_self_explanatory(error) else logging.ERROR, "where it failed", exc_info=error)
        show_on_stderr(f"failed: {type(error).__name__}: {str(error)[:ERROR_SHOWN]}; {left()}")
        return 1
    return 0


def set_log_level(verbose: bool) -> None:
    """Log details if `verbose`, else only notes and warnings."""
    logging.getLogger().setLevel(logging.INFO if verbose else NOTE)


def _is_self_explanatory(error: Exception) -> bool:
    """Return whether the error's message is sufficient without a traceback (disk, memory, NaN)."""
    from delta_selectivity.run.row_store import NonFiniteError
    from delta_selectivity.system.out_of_memory import is_out_of_memory

    return isinstance(error, OSError | NonFiniteError) or is_out_of_memory(error)
