"""Reconstruction error sums on a CPU, compiled by Numba."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.system.compiled import compiled

BLOCK = 64  # rows summed in float32, column by column, before the sum is added in float64

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Latents = NDArray[np.int64] | NDArray[np.int32]


@compiled(fastmath={"reassoc", "contract", "nsz"})
def compare(x: Floats, recon: Floats, rows: NDArray[np.int64]) -> tuple[Floats, Doubles, Doubles]:
    """Return the squared errors of reconstructions, with the mean and the spread of the rows.

    Args:
        x: The activations ``[all, d]``.
        recon: Their reconstructions ``[all, d]``.
        rows: Indices of the rows to compare ``[n]``.

    Returns:
        The squared error of each row ``[all]``, 0 for rows that are not compared, NaN or Inf if x or the reconstruction
        is; the mean of x ``[d]``; and ``[2]``, the sums of the squared errors and of the squared deviations of x from
        its mean.
    """
    n, d = len(rows), x.shape[1]
    errors, part = np.zeros(len(x), np.float32), np.empty(d, np.float32)
    mean, sums = np.zeros(d, np.float64), np.zeros(2, np.float64)
    for start in range(0, n, BLOCK):
        part[:] = 0
        for r in rows[start : min(start + BLOCK, n)]:
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
        near_mean[i] = mean[i] / max(n, 1)
    mean[:] = 0
    deviation = np.float64(0)
    for start in range(0, n, BLOCK):
        part[:] = 0
        for r in rows[start : min(start + BLOCK, n)]:
            squares = np.float32(0)
            for i in range(d):
                offset = x[r, i] - near_mean[i]
                part[i] += offset
                squares += offset * offset
            deviation += squares
        for i in range(d):
            mean[i] += part[i]
    for i in range(d):
        rounding = mean[i] / max(n, 1)
        deviation -= n * rounding * rounding
        mean[i] = near_mean[i] + rounding
    sums[1] = max(deviation, 0.0)
    return errors, mean, sums


@compiled()
def merge(
    n: float, mean: Doubles, sums: Doubles, other_n: float, other_mean: Doubles, other_sums: Doubles
) -> tuple[Doubles, Doubles]:
    """Return the mean ``[d]`` and sums ``[2]`` of `compare` for the union of two sets of rows."""
    new_mean, new_sums = np.empty_like(mean), sums + other_sums
    share = other_n / (n + other_n)
    squares = 0.0
    for i in range(len(mean)):
        difference = other_mean[i] - mean[i]
        new_mean[i] = mean[i] + difference * share
        squares += difference * difference
    new_sums[1] += squares * n * share
    return new_mean, new_sums


@compiled()
def add_fired(
    rows: NDArray[np.int64],
    number: NDArray[np.int64],
    crow: NDArray[np.int64],
    col: Latents,
    value: Floats,
    fired: NDArray[np.int64],
) -> None:
    """Add the rows in which a latent is not zero to its count and to its sum of row numbers.

    Args:
        rows: Indices of the rows to add.
        number: A unique number for each row ``[n]``.
        crow: The start of each row's latents, and the end of the last ``[n + 1]``.
        col: Latent indices ``[nnz]``.
        value: Latent activations ``[nnz]``.
        fired: Counts and sums ``[2, d_sae]``, updated in place.

    Raises:
        IndexError: A latent index is out of range.
    """
    for r in rows:
        for q in range(crow[r], crow[r + 1]):
            if not 0 <= col[q] < fired.shape[1]:
                raise IndexError("a code has a latent index outside d_sae")
            if value[q] != 0:
                fired[0, col[q]] += 1
                fired[1, col[q]] += number[r]
