"""What a TopK encoder does with each row on a CPU, compiled by Numba: the k largest entries, a guess that is rescored.

Every kernel works row by row, so a row's result does not depend on its company, and lets other threads run meanwhile.
A row that holds NaN gets NaN for all of its values.

Numbers are compared as integers. A number's *key* is the integer of its bits, with those below the sign turned over if
it is negative: keys are in the order of the numbers, -0 below 0. Those of bfloat16 have 16 bits, so that an instruction
compares twice as many as of float32. The k-th largest key is found by bisection: counting how many of a hundred keys
reach another takes some ten instructions.

A row is divided into groups. Where k or more of the groups' maxima reach a threshold, so do the k largest entries.

What is left of many rows is found before any of it is rescored: the rows of a guess and the weights do not take the
cache from each other.

Inside a loop over rows nothing is sliced, viewed or made: for Numba each is two atomic operations or an allocation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compiled import compiled

GROUPS_PER_K = 4  # at least: with 2 there are more members to look at, with 8 more maxima: either takes longer
LARGEST_GROUP = 64  # in wide rows looking at a maximum costs less than looking at members
EIGHT, LAST_BYTE = np.uint64(8), np.uint64(56)  # bytes in a word of 64 bits; the bits below its last byte
NUMBERED = np.uint64(0x0001020304050607)  # times a word with a 1 in byte j, its last byte is j
NONE, NEXT, FOUR = np.uint64(0), np.uint64(1), np.uint64(4)
ROOM = 2**14  # places of rows' largest that are known before they are rescored: they stay in the cache
STRIP = 64  # so many keys are compared in a row of instructions: of any other number it takes a loop and its rest
ROUND_BFLOAT16 = np.float32(2.0**-8)  # largest relative error of a float32 number that is rounded to bfloat16
ROUND_SUM = np.float32(2.0**-23)  # of one float32 addition or product, twice: for a guess and what it is compared with
ZERO, ONE = np.float32(0), np.float32(1)
LARGEST_KEY = np.int32(2**31 - 1)

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Places = NDArray[np.uint64]  # an index that may be negative takes Numba a comparison more
BFloat16s = NDArray[np.int16]  # by their bits: the upper half of a float32's
Keys = NDArray[np.int16] | NDArray[np.int32]


@compiled()
def k_largest(rows: Floats, k: int) -> tuple[Floats, Ints]:
    """The k largest entries of each row, in no order, and their places.

    Args:
        rows: ``[rows, d]``.
        k: how many, at most d.

    Returns:
        values and places, both ``[rows, k]``.
    """
    n, d = rows.shape
    values, places = np.empty(n * k + 1, np.float32), np.empty(n * k + 1, np.int64)  # `_take` needs one more
    keys, highest = np.empty(d, np.int32), np.empty(d + STRIP, np.int32)
    words = np.zeros((d + 7) // 8, np.uint64)
    reached, eights = words.view(np.uint8), np.empty(len(words) + 1, np.uint64)
    found, where = np.empty(d, np.float32), np.empty(d + 2, np.uint64)
    found_bits, found_keys = found.view(np.int32), np.empty(d + STRIP, np.int32)
    bits = rows.view(np.int32)
    for r in range(n):
        n_nan = np.int32(0)
        for q in range(d):
            n_nan += np.int32(rows[r, q] != rows[r, q])
            keys[q] = bits[r, q] ^ ((bits[r, q] >> np.int32(31)) & np.int32(0x7FFFFFFF))
        if n_nan > 0:
            _poison(values, places, r * k, k)
            continue
        strips = _group_maxima(keys, highest, k)
        least = np.int32(_threshold(highest, strips, k, k // 8))
        count = _at_least(keys, least, reached, words, eights, where, NONE)
        for q in range(count):
            found[q] = rows[r, where[q]]
        _take(found, found_bits, found_keys, where, NONE, count, values, places, r * k, k)
    return values[:-1].reshape(n, k), places[:-1].reshape(n, k)


@compiled(fastmath={"reassoc", "contract", "nsz"})
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


@compiled()
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
    values, places = np.empty(n * k + 1, np.float32), np.empty(n * k + 1, np.int64)  # `_take` needs one more
    keys, highest = np.empty(d, np.int16), np.empty(d + STRIP, np.int16)
    words = np.zeros((d + 7) // 8, np.uint64)
    reached, eights = words.view(np.uint8), np.empty(len(words) + 1, np.uint64)
    found, number = np.empty(d, np.float32), np.empty(1, np.float32)
    found_bits, found_keys, number_bits = found.view(np.int32), np.empty(d + STRIP, np.int32), number.view(np.int32)
    where, stops = np.empty(ROOM + d + 2, np.uint64), np.empty(n, np.uint64)
    first, stop = 0, NONE  # the first row that is not rescored yet; the end of what is to be rescored
    for r in range(n):
        if np.isfinite(off[r]):
            for q in range(d):
                keys[q] = proposed[r, q] ^ ((proposed[r, q] >> np.int16(15)) & np.int16(0x7FFF))
            strips = _group_maxima(keys, highest, k)
            key = _threshold(highest, strips, k, k // 8)
            number_bits[0] = (key ^ ((key >> 31) & 0x7FFF)) << 16  # the number whose key that is
            number[0] = _least_that_may_be(number[0], off[r])
            stop += _at_least(keys, np.int16(_least_key(number_bits[0])), reached, words, eights, where, stop)
        else:  # NaN or Inf in x: so are all of the products
            for q in range(d):
                where[stop + np.uint64(q)] = np.uint64(q)
            stop += np.uint64(d)
        stops[r] = stop
        if stop < ROOM and r + 1 < n:
            continue
        start = NONE
        for done in range(first, r + 1):
            count = stops[done] - start
            _products(x, done, weight, bias, where, start, count, found)
            n_nan = np.int32(0)
            for q in range(count):
                n_nan += np.int32(found[q] != found[q])
            if n_nan > 0:
                _poison(values, places, done * k, k)
            else:
                _take(found, found_bits, found_keys, where, start, count, values, places, done * k, k)
            start = stops[done]
        first, stop = r + 1, NONE
    return values[:-1].reshape(n, k), places[:-1].reshape(n, k)


@compiled()
def _least_key(bits: int) -> int:
    """The least key of a bfloat16 number that is at least the float32 number of these bits."""
    if bits > 0:
        return min(int(bits + 0xFFFF) >> 16, 0x7FFF)
    return int(bits ^ 0x7FFFFFFF) >> 16 if bits < 0 else -1  # -1: that of -0


@compiled()
def _least_that_may_be(proposed: np.float32, off: np.float32) -> np.float32:
    """The least proposal of an entry that may be as large as one that is proposed as `proposed`."""
    if not np.isfinite(proposed):  # a guess of Inf says nothing of how large the entry is
        return -np.float32(np.inf)
    least = proposed - ROUND_BFLOAT16 * abs(proposed) - 2 * off  # once for either entry
    return least / (ONE + ROUND_BFLOAT16) if least >= ZERO else least / (ONE - ROUND_BFLOAT16)


@compiled()
def _group_maxima(keys: Keys, highest: Keys, k: int) -> int:
    """The largest key of each of k or more groups into the first strips of `highest`; how many strips.

    The second half of what is left is held against the first until there are few enough.
    """
    groups, enough = len(keys), max(GROUPS_PER_K * k, len(keys) // LARGEST_GROUP)
    if groups < 2 * enough:
        for g in range(groups):
            highest[g] = keys[g]
    else:
        for g in range(groups // 2):
            highest[g] = keys[g] if keys[g] > keys[groups // 2 + g] else keys[groups // 2 + g]
        if groups % 2:
            highest[0] = max(highest[0], keys[groups - 1])
        groups //= 2
    while groups >= 2 * enough:
        half = groups // 2
        for g in range(half):
            highest[g] = highest[g] if highest[g] > highest[half + g] else highest[half + g]
        if groups % 2:
            highest[0] = max(highest[0], highest[groups - 1])
        groups = half
    smallest = highest[0]
    for g in range(groups):
        smallest = highest[g] if highest[g] < smallest else smallest
    return _filled(highest, groups, smallest)


@compiled()
def _filled(keys: Keys, count: int, smallest: np.int16 | np.int32) -> int:
    """How many strips the first `count` keys take; the smallest is put where there are none."""
    strips = (count + STRIP - 1) // STRIP
    for q in range(count, strips * STRIP):
        keys[q] = smallest
    return strips


@compiled()
def _threshold(keys: Keys, strips: int, k: int, slack: int) -> int:
    """What at least k of the keys in the first `strips` reach, and no more than `slack` others unless they equal it."""
    low = high = keys[0]
    for strip in range(strips):
        for q in range(strip * STRIP, (strip + 1) * STRIP):
            low = keys[q] if keys[q] < low else low
            high = keys[q] if keys[q] > high else high
    least, most = int(low), int(high)
    while least < most:
        middle = (least + most + 1) >> 1
        count = 0
        for strip in range(strips):
            counted = keys.dtype.type(0)  # in the keys' own width: in a wider one fewer are compared at a time
            for q in range(strip * STRIP, (strip + 1) * STRIP):
                counted = keys.dtype.type(counted + keys.dtype.type(keys[q] >= keys.dtype.type(middle)))
            count += int(counted)
        if count >= k:
            least = middle
            if count <= k + slack:
                break
        else:
            most = middle - 1
    return least


@compiled()
def _at_least(
    keys: Keys,
    least: np.int16 | np.int32,
    reached: NDArray[np.uint8],
    words: Places,
    eights: Places,
    where: Places,
    start: np.uint64,
) -> np.uint64:
    """Into `where`, from `start` on, the places of the keys that reach `least`; how many. It has room for two more.

    reached, eights: scratch; words: that of `reached`, eight keys in one, which are passed over if none of them does.
    Branches depend on where more than two of eight do, which is rare.
    """
    for place in range(len(keys)):
        reached[place] = keys[place] >= least
    some = NONE
    for word in range(len(words)):
        eights[some] = np.uint64(word)
        some += np.uint64(words[word] != NONE)
    end = start
    for q in range(some):
        first, left = EIGHT * eights[q], words[eights[q]]
        lowest = left & (NONE - left)
        where[end] = first + ((lowest * NUMBERED) >> LAST_BYTE)
        left ^= lowest
        lowest = left & (NONE - left)
        where[end + NEXT] = first + ((lowest * NUMBERED) >> LAST_BYTE)
        end += NEXT + np.uint64(left != NONE)
        left ^= lowest
        while left != NONE:
            lowest = left & (NONE - left)
            where[end] = first + ((lowest * NUMBERED) >> LAST_BYTE)
            end += NEXT
            left ^= lowest
    return end - start


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _products(
    x: Floats, r: int, weight: Floats, bias: Floats, where: Places, start: np.uint64, count: np.uint64, found: Floats
) -> None:
    """Row r of x times the weights at `count` of `where` from `start` on, four at a time, plus their biases."""
    d_in = x.shape[1]
    whole = count - count % FOUR
    for q in range(NONE, whole, FOUR):
        p = start + q
        a, b, c, d = where[p], where[p + NEXT], where[p + NEXT + NEXT], where[p + NEXT + NEXT + NEXT]
        sum_a, sum_b, sum_c, sum_d = bias[a], bias[b], bias[c], bias[d]
        for i in range(d_in):
            sum_a += x[r, i] * weight[a, i]
            sum_b += x[r, i] * weight[b, i]
            sum_c += x[r, i] * weight[c, i]
            sum_d += x[r, i] * weight[d, i]
        found[q], found[q + NEXT], found[q + NEXT + NEXT], found[q + NEXT + NEXT + NEXT] = sum_a, sum_b, sum_c, sum_d
    for q in range(whole, count):
        a = where[start + q]
        sum_a = bias[a]
        for i in range(d_in):
            sum_a += x[r, i] * weight[a, i]
        found[q] = sum_a


@compiled()
def _take(
    found: Floats,
    bits: NDArray[np.int32],
    keys: NDArray[np.int32],
    where: Places,
    start: np.uint64,
    count: np.uint64,
    values: Floats,
    places: Ints,
    slot: int,
    k: int,
) -> None:
    """The k largest of the first `count` numbers found into values and places from `slot` on.

    What is in the slot after these is of no more use.

    bits: that of `found`; keys: scratch, STRIP more than `count`; where: of the numbers, from `start` on.
    """
    smallest = LARGEST_KEY
    for q in range(count):
        keys[q] = bits[q] ^ ((bits[q] >> np.int32(31)) & np.int32(0x7FFFFFFF))
        smallest = keys[q] if keys[q] < smallest else smallest
    strips = _filled(keys, int(count), smallest)
    least = np.int32(_threshold(keys, strips, k, 0))
    free, end = np.uint64(slot), np.uint64(slot + k)
    for q in range(count):
        values[free], places[free] = found[q], np.int64(where[start + q])
        free += np.uint64(keys[q] > least)
    for q in range(count):  # those that equal the k-th, as long as there is room
        values[free], places[free] = found[q], np.int64(where[start + q])
        free += np.uint64((keys[q] == least) & (free < end))


@compiled()
def _poison(values: Floats, places: Ints, slot: int, k: int) -> None:
    """NaN for every value of a row, so that whatever is made of them is NaN."""
    for q in range(k):
        values[slot + q], places[slot + q] = np.nan, q
