"""A value that a thread computes while its future reader does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """The value of a function, computed by a thread of its own from now on. The thread does not hold up an exit."""

    def __init__(self, compute: Callable[[], T], name: str) -> None:
        """Start the thread with this name."""
        self._value: Future[T] = Future()
        threading.Thread(target=self._run, args=(compute,), name=name, daemon=True).start()

    def result(self) -> T:
        """Return the value, waiting for it if needed; re-raise what computing it raised."""
        return self._value.result()

    def _run(self, compute: Callable[[], T]) -> None:
        try:
            self._value.set_result(compute())
        except BaseException as error:  # of any kind: `result` raises it in the thread that asks
            self._value.set_exception(error)
