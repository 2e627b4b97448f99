"""Squared errors and deviations of rows on a CPU: two passes over them where torch takes eight; compiled by Numba."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compiled import compiled

BLOCK = 64  # rows that are added up in float32, column by column, before they go into a sum in float64

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@compiled(fastmath={"reassoc", "contract", "nsz"})
def compare(x: Floats, recon: Floats) -> tuple[Floats, Doubles, float]:
    """How far rows are from their reconstructions, and from each other.

    Args:
        x, recon: ``[rows, d]``; at least one row.

    Returns:
        The squared error of each row ``[rows]``, NaN or Inf where one of the two holds that; the mean of x ``[d]``; the
        squared deviations of x from it, summed over rows and coordinates.
    """
    n, d = x.shape
    errors, part = np.empty(n, np.float32), np.empty(d, np.float32)
    mean = np.zeros(d, np.float64)
    for start in range(0, n, BLOCK):
        part[:] = 0
        for r in range(start, min(start + BLOCK, n)):
            error = np.float32(0)
            for i in range(d):
                part[i] += x[r, i]
                error += (x[r, i] - recon[r, i]) * (x[r, i] - recon[r, i])
            errors[r] = error
        for i in range(d):
            mean[i] += part[i]
    near_mean = np.empty(d, np.float32)
    for i in range(d):
        near_mean[i] = mean[i] / n
    mean[:] = 0
    deviation = np.float64(0)
    for start in range(0, n, BLOCK):
        part[:] = 0
        for r in range(start, min(start + BLOCK, n)):
            squares = np.float32(0)
            for i in range(d):
                offset = x[r, i] - near_mean[i]
                part[i] += offset
                squares += offset * offset
            deviation += squares
        for i in range(d):
            mean[i] += part[i]
    for i in range(d):
        rounding = mean[i] / n
        deviation -= n * rounding * rounding
        mean[i] = near_mean[i] + rounding
    return errors, mean, max(deviation, 0.0)
