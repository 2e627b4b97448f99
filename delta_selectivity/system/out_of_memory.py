"""Detection of out-of-memory errors, and retries with smaller pieces.

budget = MemoryBudget("rows are scored")
budget.run_in_pieces(n_rows, 8 * n_probes, score)  # score(slice(0, n_rows)), or repeatedly halved slices
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)

ERRORS = (torch.OutOfMemoryError, MemoryError, RuntimeError)  # to catch; then check with `is_out_of_memory`
_SIGNS = (  # in a RuntimeError; the last is oneDNN's
    "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "could not create a primitive",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory of the GPU or CPU ran out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in _SIGNS)


def release() -> None:
    """Release the GPU allocator's cached memory, so that pieces of other sizes fit."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class MemoryBudget:
    """The amount of one kind of work that fits into memory at a time, shared by all threads.

    Work consists of units (columns, rows) with a number of cells each. The limit is stored in cells, so that it applies
    to work with other units too.
    """

    def __init__(self, what: str) -> None:
        self._what = what  # for the warning: "probes are fitted"
        self._max_cells: int | None = None  # None: no failure so far
        self._logged = False

    def max_units(self, cells: int) -> int:
        """Return how many units of this many cells to try at a time, at least 1."""
        return sys.maxsize if self._max_cells is None else max(1, self._max_cells // max(cells, 1))

    def halve(self, units: int, cells: int) -> None:
        """Record that this many units did not fit, and halve the limit."""
        release()
        half = units // 2 * max(cells, 1)
        self._max_cells = half if self._max_cells is None else min(half, self._max_cells)

    def record_success(self, units: int) -> None:
        """Record that this many units fitted, and log it the first time after a failure."""
        if self._max_cells is not None and not self._logged:
            self._logged = True
            note = "results change by less than the tolerance of a fit"
            log.warning("out of memory: %s %d at a time from now on; %s", self._what, units, note)

    def run_in_pieces(self, n: int, cells: int, work: Callable[[slice], None]) -> None:
        """Call `work` on slices that cover range(n), as large as memory allows.

        A failed slice is retried in halves, so `work` must be repeatable. Raises its error if it is not an
        out-of-memory error or a single unit does not fit.
        """
        done = 0
        while done < n:
            size = min(n - done, self.max_units(cells))
            try:
                work(slice(done, done + size))
            except ERRORS as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
            else:
                self.record_success(size)
                done += size
                continue
            self.halve(size, cells)  # outside of `except`, where the error still refers to the failed piece
