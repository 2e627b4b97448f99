"""The decorator for loops compiled by Numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return Numba's `njit` without the GIL, with a disk cache if one is writable.

    Division by 0 gives inf or NaN as in NumPy: Python's check for it would keep loops from being vectorised.
    """
    options = {"error_model": "numpy", "nogil": True, **options}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no writable cache: compile in every process
            return njit(**options)(function)

    return decorate
