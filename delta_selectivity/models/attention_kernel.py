"""The compiled softmax of causal attention over the bits of bfloat16 scores, in place (`attention`)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.system.compiled import compiled

Floats = NDArray[np.float32]
Bits = NDArray[np.uint32]

_LOG2_E = np.float32(math.log2(math.e))
_ROUND = np.float32(3 * 2.0**22)  # float32 numbers of this size are whole; their last bits are those of the integer
_LEAST = np.float32(-126)  # exponent of the smallest normal number
_P0, _P1, _P2, _P3, _P4, _P5 = (np.float32(math.log(2) ** k / math.factorial(k)) for k in range(6))


@compiled(fastmath={"nsz", "contract"})
def causal_softmax(
    scores: NDArray[np.uint16], factor: np.float32, values: Floats, value_bits: Bits, whole: Floats, whole_bits: Bits
) -> None:
    """Replace scores `[n, tokens, tokens]` by the softmax of factor x score over the tokens up to each; 0 after it.

    The scores are bits of bfloat16 numbers, the upper halves of float32 numbers. values and whole are memory for
    `[tokens]` numbers, value_bits and whole_bits are the same memory. Sums are float32, and each weight is rounded
    once. A row with NaN, or whose largest score is infinite, becomes NaN.
    """
    n, n_tokens, _ = scores.shape
    factor = factor * _LOG2_E
    for matrix in range(n):
        for token in range(n_tokens):
            row, seen = scores[matrix, token], token + 1
            for i in range(seen):
                value_bits[i] = np.uint32(row[i]) << np.uint32(16)
            largest = _largest(values, seen)
            for i in range(seen):  # 2^x as 2^n 2^f, n whole and f in [-1/2, 1/2], where 2^f is its Taylor polynomial
                x = (values[i] - largest) * factor
                x = _LEAST if x < _LEAST else x
                rounded = x + _ROUND
                f = x - (rounded - _ROUND)
                values[i] = _P0 + f * (_P1 + f * (_P2 + f * (_P3 + f * (_P4 + f * _P5))))
                whole[i] = rounded if x == x else _ROUND
            for i in range(seen):
                value_bits[i] += whole_bits[i] << np.uint32(23)
            share = np.float32(1) / _sum(values, seen)
            for i in range(seen):
                values[i] *= share
            for i in range(seen):
                odd = (value_bits[i] >> np.uint32(16)) & np.uint32(1)  # round to nearest, ties to even
                row[i] = np.uint16((value_bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))
            if share != share:
                row[:seen] = 0x7FC0
            row[seen:] = 0


@compiled(fastmath={"nnan"})
def _largest(values: Floats, n: int) -> np.float32:
    """Return the largest of the first n values; of NaN, any."""
    found = values[0]
    for i in range(n):
        found = values[i] if values[i] > found else found
    return found


@compiled(fastmath={"reassoc"})
def _sum(values: Floats, n: int) -> np.float32:
    """Return the sum of the first n values."""
    total = np.float32(0)
    for i in range(n):
        total += values[i]
    return total
