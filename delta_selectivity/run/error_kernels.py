"""Reconstruction error sums on a CPU, compiled by Numba."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.system.compiled import compiled

BLOCK = 64  # rows that are added up in float32, column by column, before they go into a sum in float64

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Latents = NDArray[np.int64] | NDArray[np.int32]


@compiled(fastmath={"reassoc", "contract", "nsz"})
def compare(x: Floats, recon: Floats) -> tuple[Floats, Doubles, Doubles]:
    """How far rows are from their reconstructions, and from each other.

    Args:
        x, recon: ``[rows, d]``; at least one row.

    Returns:
        The squared error of each row ``[rows]``, NaN or Inf where one of the two holds that; the mean of x ``[d]``; and
        ``[2]``: the sum of the squared errors, and that of the squared deviations of x from its mean.
    """
    n, d = x.shape
    errors, part = np.empty(n, np.float32), np.empty(d, np.float32)
    mean, sums = np.zeros(d, np.float64), np.zeros(2, np.float64)
    for start in range(0, n, BLOCK):
        part[:] = 0
        for r in range(start, min(start + BLOCK, n)):
            error = np.float32(0)
            for i in range(d):
                part[i] += x[r, i]
                error += (x[r, i] - recon[r, i]) * (x[r, i] - recon[r, i])
            errors[r] = error
            sums[0] += error
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
    sums[1] = max(deviation, 0.0)
    return errors, mean, sums


@compiled()
def merge(
    n: int, mean: Doubles, sums: Doubles, other_n: int, other_mean: Doubles, other_sums: Doubles
) -> tuple[Doubles, Doubles]:
    """Mean ``[d]`` and sums ``[2]``, as of `compare`, of both of two sets of so many rows."""
    new_mean, new_sums = np.empty_like(mean), sums + other_sums
    share = other_n / (n + other_n)
    squares = 0.0
    for i in range(len(mean)):
        apart = other_mean[i] - mean[i]
        new_mean[i] = mean[i] + apart * share
        squares += apart * apart
    new_sums[1] += squares * n * share
    return new_mean, new_sums


@compiled()
def count_fired(col: Latents, value: Floats, fired: NDArray[np.int64]) -> None:
    """Add to each latent's count ``[d_sae]`` its entries that are not zero: latents and values ``[nnz]``.

    Raises IndexError for a latent that there is not.
    """
    for q in range(len(col)):
        if not 0 <= col[q] < len(fired):
            raise IndexError("a code names a latent that the SAE does not have")
        fired[col[q]] += np.int64(value[q] != 0)
