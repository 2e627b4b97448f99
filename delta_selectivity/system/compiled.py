"""How loops are compiled by Numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Numba's `njit` without the GIL, kept on disk where it can be: beside the file, or in the user's cache."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # neither can be written to: compiled anew in every process
            return njit(nogil=True, **options)(function)

    return decorate
