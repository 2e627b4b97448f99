"""Recognise out-of-memory errors, and redo the work in smaller pieces.

room = Room("rows are scored")
room.in_pieces(n_rows, 8 * n_probes, score)  # score(slice(0, n_rows)), or its halves, or theirs
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)

ERRORS = (torch.OutOfMemoryError, MemoryError, RuntimeError)  # to catch, and then to look at with `is_out_of_memory`
_SIGNS = (  # in a RuntimeError; the last is oneDNN's
    "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "could not create a primitive",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller piece could have fitted, on the GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in _SIGNS)


def release() -> None:
    """Give back what the GPU's allocator keeps for later, so that pieces of other sizes have room."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class Room:
    """What was learnt of the memory for one kind of work: how much of it fits at a time, in whatever thread.

    Work comes in units (columns, rows), each of so many cells; the cells that fit are remembered, so that work with
    other units starts from what is known.
    """

    def __init__(self, what: str) -> None:
        self._what = what  # of the warning: "probes are fitted"
        self._max_cells: int | None = None  # None: nothing has failed yet
        self._told = False

    def units(self, cells: int) -> int:
        """How many units of so many cells to try at a time; 1 or more."""
        return sys.maxsize if self._max_cells is None else max(1, self._max_cells // max(cells, 1))

    def halve(self, units: int, cells: int) -> None:
        """So many units did not fit: from now on half as many."""
        release()
        half = units // 2 * max(cells, 1)
        self._max_cells = half if self._max_cells is None else min(half, self._max_cells)

    def fitted(self, units: int) -> None:
        """So many units fitted. Says so, the first time after some did not."""
        if self._max_cells is not None and not self._told:
            self._told = True
            note = "numbers stay within the tolerance of a fit"
            log.warning("out of memory: %s %d at a time from now on; %s", self._what, units, note)

    def in_pieces(self, n: int, cells: int, work: Callable[[slice], None]) -> None:
        """Call `work` on slices that cover range(n), all of it at once as long as memory allows.

        A slice that fails is tried again in halves: `work` must not mind. Raises its error if that is of another
        kind, or if a single unit does not fit.
        """
        done = 0
        while done < n:
            size = min(n - done, self.units(cells))
            try:
                work(slice(done, done + size))
            except ERRORS as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
            else:
                self.fitted(size)
                done += size
                continue
            self.halve(size, cells)  # here: the error held on to the piece that failed
