"""What a TopK encoder does with each row on a CPU, compiled by Numba: the k largest entries, a guess that is rescored.

Every kernel works row by row, so a row's result does not depend on its company, and lets other threads run meanwhile.
A row that holds NaN gets NaN for all of its values.

A row is divided into groups. Where k or more of the groups' maxima reach a threshold, so do the k largest entries. The
threshold is found by bisection: counting how many of a hundred numbers reach another takes some ten instructions.

Guesses in bfloat16 are compared as integers, twice as many in an instruction as floats. A number's *key* is the integer
of its bits, with those below the sign turned over if it is negative: keys are in the order of the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

GROUPS_PER_K = 4  # with 2 there are more members to look at, with 8 more maxima: either takes longer
LARGEST_GROUP = 64  # in wide rows looking at a maximum costs less than looking at members
EIGHT = 8  # bytes in a word of 64 bits
STEPS = 16  # of a bisection; it may stop anywhere
ROUND_BFLOAT16 = np.float32(2.0**-8)  # largest relative error of a float32 number that is rounded to bfloat16
ROUND_SUM = np.float32(2.0**-23)  # of one float32 addition or product, twice: for a guess and what it is compared with
HALF, ZERO, ONE = np.float32(0.5), np.float32(0), np.float32(1)

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
BFloat16s = NDArray[np.int16]  # by their bits: the upper half of a float32's
Keys = NDArray[np.int16]
BELOW_SIGN = np.int16(0x7FFF)


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Numba's `njit`, kept on disk where there is a folder for it: beside this file, or the user's cache."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # neither can be written to: compiled anew in every process
            return njit(nogil=True, **options)(function)

    return decorate


@_compiled()
def _n_groups(d: int, k: int) -> int:
    """Into how many groups to divide a row of d entries for its k largest: at least k, at most d."""
    return min(d, max(GROUPS_PER_K * k, d // LARGEST_GROUP))


@_compiled()
def _n_eights(d: int) -> int:
    """How often eight it takes to hold d."""
    return (d + EIGHT - 1) // EIGHT


@_compiled()
def k_largest(rows: Floats, k: int) -> tuple[Floats, Ints]:
    """The k largest entries of each row, in no order, and their places.

    Args:
        rows: ``[rows, d]``.
        k: how many, at most d.

    Returns:
        values and places, both ``[rows, k]``.
    """
    n, d = rows.shape
    values, places = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    maxima, scratch = np.empty(_n_groups(d, k), np.float32), np.empty(d, np.float32)
    found, where = np.empty(d + 1, np.float32), np.empty(d + 1, np.int64)
    reached, eights = np.zeros(_n_eights(d) * EIGHT, np.uint8), np.empty(_n_eights(d), np.int64)
    for r in range(n):
        row = rows[r]
        if _group_maxima(row, maxima):
            _poison(values[r], places[r])
            continue
        count = _at_least(row, _threshold(maxima, k, k // 8), reached, eights, where)
        for q in range(count):
            found[q] = row[where[q]]
        _take(found, where, count, scratch, values[r], places[r])
    return values, places


@_compiled(fastmath={"reassoc", "contract", "nsz"})
def round_inputs(x: Floats, centre: Floats, size: float, rounding: float, least: float) -> tuple[BFloat16s, Floats]:
    """Inputs less their centre in bfloat16, and how far products of them with rounded weights are off at most.

    Args:
        x: ``[rows, d_in]``.
        centre: ``[d_in]``.
        size: largest norm of a weight.
        rounding: largest norm of what a weight lost by being rounded.
        least: what products are off by in any case.

    Returns:
        The rounded inputs ``[rows, d_in]``, and what products are off by ``[rows]``: NaN or Inf where x holds that.
    """
    n, d = x.shape
    halves, off = np.empty((n, d), np.int16), np.empty(n, np.float32)
    y, rounded = np.empty(d, np.float32), np.empty(d, np.float32)
    bits, rounded_bits = y.view(np.uint32), rounded.view(np.uint32)
    centre_size = np.sqrt((centre * centre).sum())
    for r in range(n):
        for i in range(d):
            y[i] = x[r, i] - centre[i]
        for i in range(d):
            half = (bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            halves[r, i] = np.int16(half)
            rounded_bits[i] = half << np.uint32(16)
        of_x = of_y = of_rounded = of_loss = ZERO
        for i in range(d):
            of_x += x[r, i] * x[r, i]
            of_y += y[i] * y[i]
            of_rounded += rounded[i] * rounded[i]
            of_loss += (y[i] - rounded[i]) * (y[i] - rounded[i])
        summed = (np.sqrt(of_x) + centre_size + np.sqrt(of_y)) * size
        off[r] = np.sqrt(of_loss) * size + np.sqrt(of_rounded) * rounding + least + ROUND_SUM * d * summed
    return halves, off


@_compiled()
def k_largest_of_proposed(
    proposed: BFloat16s, off: Floats, x: Floats, weight: Floats, bias: Floats, k: int
) -> tuple[Floats, Ints]:
    """The k largest entries of x weightᵀ + bias in each row, given a guess at it, and their places, in no order.

    Args:
        proposed: the guess ``[rows, d]``, off by at most `off` before it was rounded to bfloat16; without NaN where
            that is finite.
        off: ``[rows]``.
        x: ``[rows, d_in]``.
        weight: ``[d, d_in]``.
        bias: ``[d]``.
        k: how many, at most d.

    Returns:
        values, which are sums in float32, and places, both ``[rows, k]``.
    """
    n, d = proposed.shape
    values, places = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    keys, highest = np.empty(d, np.int16), np.empty(_n_groups(d, k), np.int16)
    maxima, scratch = np.empty(_n_groups(d, k), np.float32), np.empty(d, np.float32)
    found, where = np.empty(d + 1, np.float32), np.empty(d + 1, np.int64)
    reached, eights = np.zeros(_n_eights(d) * EIGHT, np.uint8), np.empty(_n_eights(d), np.int64)
    for r in range(n):
        if np.isfinite(off[r]):
            _keys(proposed[r], keys)
            _group_maxima(keys, highest)
            _numbers(highest, maxima)
            least = _least_that_may_be(_threshold(maxima, k, k // 8), off[r])
            count = _at_least(keys, _least_key(least), reached, eights, where)
        else:  # NaN or Inf in x: so are all of the products
            count = d
            where[:d] = np.arange(d)
        _products(x, r, weight, bias, where, count, found)
        if _any_nan(found, count):
            _poison(values[r], places[r])
            continue
        _take(found, where, count, scratch, values[r], places[r])
    return values, places


@_compiled()
def _keys(halves: BFloat16s, keys: Keys) -> None:
    for place in range(len(halves)):
        keys[place] = halves[place] ^ ((halves[place] >> np.int16(15)) & BELOW_SIGN)


@_compiled()
def _numbers(keys: Keys, numbers: Floats) -> None:
    """The numbers that have these keys."""
    bits = numbers.view(np.int32)
    for q in range(len(keys)):
        key = np.int32(keys[q])
        bits[q] = (key ^ ((key >> 31) & BELOW_SIGN)) << 16


@_compiled()
def _least_key(number: np.float32) -> np.int16:
    """The least key of a bfloat16 number that is at least this one."""
    held = np.empty(1, np.float32)
    held[0] = number
    bits = np.int64(held.view(np.int32)[0])
    if bits > 0:
        return np.int16(min(int(bits + 0xFFFF) >> 16, 0x7FFF))
    return np.int16((bits ^ 0x7FFFFFFF) >> 16 if bits < 0 else -1)  # -1: that of -0


@_compiled()
def _least_that_may_be(proposed: np.float32, off: np.float32) -> np.float32:
    """The least proposal of an entry that may be as large as one that is proposed as `proposed`."""
    if not np.isfinite(proposed):  # a guess of Inf says nothing of how large the entry is
        return -np.float32(np.inf)
    least = proposed - ROUND_BFLOAT16 * abs(proposed) - 2 * off  # once for either entry
    return least / (ONE + ROUND_BFLOAT16) if least >= ZERO else least / (ONE - ROUND_BFLOAT16)


@_compiled()
def _group_maxima(row: Floats | Keys, maxima: Floats | Keys) -> bool:
    """The row's largest entry at places g, g + groups, ... into maxima[g]; whether the row holds NaN."""
    groups = len(maxima)
    maxima[:] = row[:groups]
    for start in range(groups, len(row), groups):
        part = row[start : start + groups]
        for g in range(len(part)):
            maxima[g] = part[g] if part[g] > maxima[g] else maxima[g]
    return _any_nan(row, len(row))


@_compiled()
def _threshold(numbers: Floats, k: int, slack: int) -> np.float32:
    """A number that at least k of the numbers reach, and if it is soon found no more than `slack` others."""
    low = high = numbers[0]
    for number in numbers:
        low = number if number < low else low
        high = number if number > high else high
    for _ in range(STEPS):
        middle = HALF * (low + high)
        count = np.int32(0)
        for number in numbers:
            count += np.int32(number >= middle)
        if count >= k:
            low = middle
            if count <= k + slack:
                break
        else:
            high = middle
    return low


@_compiled()
def _at_least(
    row: Floats | Keys, least: np.float32 | np.int16, reached: NDArray[np.uint8], eights: Ints, where: Ints
) -> int:
    """Into `where` the places of the entries that reach `least`; how many. No branch depends on an entry.

    reached, eights: scratch; eight entries at a time are passed over if none of them does.
    """
    for place in range(len(row)):
        reached[place] = row[place] >= least
    words = reached.view(np.uint64)
    some = count = 0
    for word in range(len(words)):
        eights[some] = word
        some += words[word] != 0
    for q in range(some):
        first = EIGHT * eights[q]
        for place in range(first, first + EIGHT):
            where[count] = place
            count += reached[place]
    return count


@_compiled(fastmath={"reassoc", "contract", "nsz"})
def _products(x: Floats, r: int, weight: Floats, bias: Floats, where: Ints, count: int, found: Floats) -> None:
    """Row r of x times the weights at the first `count` of `where`, four at a time, plus their biases."""
    d_in = x.shape[1]
    whole = count - count % 4
    for q in range(0, whole, 4):
        a, b, c, d = np.uint64(where[q]), np.uint64(where[q + 1]), np.uint64(where[q + 2]), np.uint64(where[q + 3])
        sum_a, sum_b, sum_c, sum_d = bias[a], bias[b], bias[c], bias[d]
        for i in range(d_in):
            sum_a += x[r, i] * weight[a, i]
            sum_b += x[r, i] * weight[b, i]
            sum_c += x[r, i] * weight[c, i]
            sum_d += x[r, i] * weight[d, i]
        found[q], found[q + 1], found[q + 2], found[q + 3] = sum_a, sum_b, sum_c, sum_d
    for q in range(whole, count):
        a = np.uint64(where[q])
        sum_a = bias[a]
        for i in range(d_in):
            sum_a += x[r, i] * weight[a, i]
        found[q] = sum_a


@_compiled()
def _take(found: Floats, where: Ints, count: int, scratch: Floats, values: Floats, places: Ints) -> None:
    """The largest of the first `count` numbers found, as many as `values` has room for."""
    k = len(values)
    least, left = _threshold(found[:count], k, 0), 0
    for q in range(count):
        found[left], where[left] = found[q], where[q]
        left += found[q] >= least
    room = k  # for numbers that equal the k-th
    if left > k:
        least = _kth_largest(found, left, k, scratch)
        for q in range(left):
            room -= found[q] > least
    kept = 0
    for q in range(left):
        if found[q] > least or (found[q] == least and room > 0):
            room -= found[q] == least
            values[kept], places[kept] = found[q], where[q]
            kept += 1


@_compiled()
def _kth_largest(numbers: Floats, count: int, k: int, scratch: Floats) -> np.float32:
    """The k-th largest of the first `count` numbers, by Hoare's selection."""
    scratch[:count] = numbers[:count]
    first, last = 0, count - 1
    while first < last:
        pivot = scratch[(first + last) // 2]
        i, j = first, last
        while i <= j:
            while scratch[i] > pivot:
                i += 1
            while scratch[j] < pivot:
                j -= 1
            if i <= j:
                scratch[i], scratch[j] = scratch[j], scratch[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            last = j
        elif k - 1 >= i:
            first = i
        else:
            break
    return scratch[k - 1]


@_compiled()
def _any_nan(numbers: Floats | Keys, count: int) -> bool:
    n_nan = np.int32(0)
    for q in range(count):
        n_nan += np.int32(numbers[q] != numbers[q])
    return bool(n_nan > 0)


@_compiled()
def _poison(values: Floats, places: Ints) -> None:
    """NaN for every value of a row, so that whatever is made of them is NaN."""
    for q in range(len(values)):
        values[q], places[q] = np.nan, q
