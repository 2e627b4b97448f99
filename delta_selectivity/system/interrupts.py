"""Handlers of Ctrl-C, SIGTERM and SIGHUP outside a run's two threads; `pipeline` handles those.

A signal that is ignored (`nohup`, a background job) stays ignored.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

_exits = False


def exit_on_signals() -> None:
    """Make the signals exit the process with code 130, while the program loads and after `main`."""
    global _exits
    _exits = True
    for number in handled_signals():
        signal.signal(number, _on_signal)


def exits_on_signals() -> bool:
    """Return whether this process is one of the package's programs, which may exit, and not a user's session."""
    return _exits


def _on_signal(_number: int, _frame: object) -> None:
    with suppress(OSError):  # stderr may be closed
        os.write(
            2,
            b"interrupted: no run was in progress; repeat the command to start or continue one\n",
        )
    os._exit(130)


def exit_now(code: int) -> NoReturn:
    """Exit the process with this code, after flushing output.

    A normal exit takes a second to unload torch. A signal in that time would kill the process and turn success into
    failure.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # the stream may be closed or missing
            stream.flush()
    os._exit(code)


@contextmanager
def as_keyboard_interrupt() -> Iterator[None]:
    """Make each of the signals raise `KeyboardInterrupt` inside the context. Has no effect outside the main thread.

    Where Python ignores it, as in `__del__` and in a callback of an import, the signal is repeated.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = signal.SIGINT

    def on_signal(number: int, _frame: object) -> NoReturn:
        nonlocal last
        last = signal.Signals(number)
        raise KeyboardInterrupt

    def on_ignored(ignored: sys.UnraisableHookArgs) -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            threading.Timer(0.01, _repeat, [last]).start()  # once this hook has returned
        else:
            hook(ignored)

    before = {number: signal.signal(number, on_signal) for number in handled_signals()}
    hook, sys.unraisablehook = sys.unraisablehook, on_ignored
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _repeat(number: signal.Signals) -> None:
    """Send a signal to the main thread, and wake it if it waits."""
    main = threading.main_thread().ident
    if main is None or not hasattr(signal, "pthread_kill"):  # Windows
        _thread.interrupt_main(number)
    else:
        signal.pthread_kill(main, number)


def handled_signals() -> list[signal.Signals]:
    """Return the signals that are not ignored and whose handler Python can restore."""
    return [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
