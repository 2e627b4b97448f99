"""Handle Ctrl-C, SIGTERM and SIGHUP outside the two threads of a run, which `pipeline` handles itself.

A signal that is ignored (`nohup`, a job in the background) stays ignored.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

_leaves = False


def leave_at_once() -> None:
    """From now on they end the process with 130: for while Python loads the program, and after `main`."""
    global _leaves
    _leaves = True
    for number in watched():
        signal.signal(number, _on_signal)


def leaves_at_once() -> bool:
    """Return whether the process is one of our programs, which may end it, and not somebody's session."""
    return _leaves


def _on_signal(_number: int, _frame: object) -> None:
    with suppress(OSError):  # nobody is there to read it
        os.write(2, b"interrupted: no run was going on; the same command starts one, or goes on with what is missing\n")
    os._exit(130)


def leave(code: int) -> NoReturn:
    """End the process with this exit code, now that all is written.

    Python would take a second to take torch down; a signal that came then would kill it, and make a failure of a
    success.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # nobody is there to read it, or there is no stream
            stream.flush()
    os._exit(code)


@contextmanager
def like_ctrl_c() -> Iterator[None]:
    """Each of them raises `KeyboardInterrupt` while inside. In the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.default_int_handler) for number in watched()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watched() -> list[signal.Signals]:
    """Return those of them that are not ignored, and whose handler Python can put back."""
    return [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
