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
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compiled import compiled

GROUPS_PER_K = 4  # at least: with 2 there are more members to look at, with 8 more maxima: either takes longer
LARGEST_GROUP = 64  # in wide rows looking at a maximum costs less than looking at members
EIGHT, LAST_BYTE = np.uint64(8), np.uint64(56)  # bytes in a word of 64 bits; the bits below its last byte
NUMBERED = np.uint64(0x0001020304050607)  # times a word with a 1 in byte j, its last byte is j
NONE, NEXT = np.uint64(0), np.uint64(1)
ROOM = 2**14  # places of rows' largest that are known before they are rescored: they stay in the cache
LANES = 16  # of 32 bits in the widest registers
FEW = 32  # of so many numbers the largest are found by comparing each with each
STRIP = 64  # so many keys of 32 bits are compared without a remainder that takes an instruction each
MOST_COUNTED = 2**14  # keys, by a number of 16 bits
ROUND_BFLOAT16 = np.float32(2.0**-8)  # largest relative error of a float32 number that is rounded to bfloat16
ROUND_SUM = np.float32(2.0**-23)  # of one float32 addition or product, twice: for a guess and what it is compared with
ZERO, ONE = np.float32(0), np.float32(1)
LEAST_KEY = np.int32(-(2**31))

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Places = NDArray[np.uint64]  # an index that may be negative takes Numba a comparison more
BFloat16s = NDArray[np.int16]  # by their bits: the upper half of a float32's
Keys = NDArray[np.int16] | NDArray[np.int32]


@compiled()
def _n_eights(d: int) -> int:
    """How often eight it takes to hold d."""
    return (d + 7) // 8


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
    values, places = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    keys, highest = np.empty(d, np.int32), np.empty(d, np.int32)
    found, where = np.empty(d, np.float32), np.empty(d + 2, np.uint64)
    reached, eights = np.zeros(8 * _n_eights(d), np.uint8), np.empty(_n_eights(d) + 1, np.uint64)
    found_keys, chosen = np.empty(d + STRIP, np.int32), np.empty(d + 1, np.uint64)
    for r in range(n):
        row = rows[r]
        if _any_nan(row, d):
            _poison(values[r], places[r])
            continue
        _float_keys(row, d, keys)
        groups = _group_maxima(keys, highest, k)
        count = _at_least(keys, np.int32(_threshold(highest[:groups], k, k // 8)), reached, eights, where)
        for q in range(count):
            found[q] = row[where[q]]
        _take(found, where, count, found_keys, chosen, values[r], places[r])
    return values, places


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
    values, places = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    keys, highest = np.empty(d, np.int16), np.empty(d, np.int16)
    reached, eights = np.zeros(8 * _n_eights(d), np.uint8), np.empty(_n_eights(d) + 1, np.uint64)
    found, found_keys, chosen = np.empty(d, np.float32), np.empty(d + STRIP, np.int32), np.empty(d + 1, np.uint64)
    where, stops = np.empty(max(ROOM, d) + d + 2, np.uint64), np.empty(n, np.int64)
    first = stop = 0  # the first row that is not rescored yet; the end of what is to be rescored
    for r in range(n):
        if np.isfinite(off[r]):
            _bfloat16_keys(proposed[r], keys)
            groups = _group_maxima(keys, highest, k)
            least = _least_that_may_be(_number(_threshold(highest[:groups], k, k // 8)), off[r])
            stop += int(_at_least(keys, np.int16(_least_key(least)), reached, eights, where[stop:]))
        else:  # NaN or Inf in x: so are all of the products
            where[stop : stop + d] = np.arange(d).astype(np.uint64)
            stop += d
        stops[r] = stop
        if stop < ROOM and r + 1 < n:
            continue
        start = 0
        for done in range(first, r + 1):
            count, there = np.uint64(stops[done] - start), where[start : stops[done]]
            _products(x, done, weight, bias, there, count, found)
            if _any_nan(found, count):
                _poison(values[done], places[done])
            else:
                _take(found, there, count, found_keys, chosen, values[done], places[done])
            start = stops[done]
        first, stop = r + 1, 0
    return values, places


@compiled()
def _bfloat16_keys(halves: BFloat16s, keys: NDArray[np.int16]) -> None:
    for place in range(len(halves)):
        keys[place] = halves[place] ^ ((halves[place] >> np.int16(15)) & np.int16(0x7FFF))


@compiled()
def _float_keys(numbers: Floats, count: int, keys: NDArray[np.int32]) -> None:
    """Of the first `count`."""
    bits = numbers.view(np.int32)
    for place in range(count):
        keys[place] = bits[place] ^ ((bits[place] >> np.int32(31)) & np.int32(0x7FFFFFFF))


@compiled()
def _number(key: int) -> np.float32:
    """The number whose key in bfloat16 this is."""
    held = np.empty(1, np.int32)
    held[0] = (key ^ ((key >> 31) & 0x7FFF)) << 16
    return held.view(np.float32)[0]


@compiled()
def _least_key(number: np.float32) -> int:
    """The least key of a bfloat16 number that is at least this one."""
    held = np.empty(1, np.float32)
    held[0] = number
    bits = np.int64(held.view(np.int32)[0])
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
    """The largest key of each group into the first of `highest`; how many groups there are, at least k.

    The second half of what is left is held against the first until there are few enough.
    """
    groups, enough = len(keys), max(GROUPS_PER_K * k, len(keys) // LARGEST_GROUP)
    for g in range(groups):
        highest[g] = keys[g]
    while groups >= 2 * enough:
        half = groups // 2
        for g in range(half):
            highest[g] = highest[g] if highest[g] > highest[half + g] else highest[half + g]
        if groups % 2:
            highest[0] = max(highest[0], highest[groups - 1])
        groups = half
    return groups


@compiled()
def _threshold(keys: Keys, k: int, slack: int) -> int:
    """A key that at least k of the keys reach, and no more than `slack` others unless they equal it."""
    low = high = keys[0]
    for q in range(len(keys)):
        low = keys[q] if keys[q] < low else low
        high = keys[q] if keys[q] > high else high
    least, most = int(low), int(high)
    while least < most:
        middle = (least + most + 1) >> 1
        count = _n_at_least(keys, keys.dtype.type(middle))
        if count >= k:
            least = middle
            if count <= k + slack:
                break
        else:
            most = middle - 1
    return least


@compiled()
def _n_at_least(keys: Keys, least: np.int16 | np.int32) -> int:
    """How many keys reach `least`. Counted in the keys' own width: in a wider one fewer are compared at a time."""
    number = keys.dtype.type
    count = 0
    for start in range(0, len(keys), MOST_COUNTED):
        part, counted = keys[start : start + MOST_COUNTED], number(0)
        for q in range(len(part)):
            counted = number(counted + number(part[q] >= least))
        count += int(counted)
    return count


@compiled()
def _at_least(
    keys: Keys, least: np.int16 | np.int32, reached: NDArray[np.uint8], eights: Places, where: Places
) -> np.uint64:
    """Into `where`, which has room for two more, the places of the keys that reach `least`; how many.

    reached, eights: scratch; eight keys at a time are passed over if none of them does. Branches depend on where more
    than two of eight do, which is rare.
    """
    for place in range(len(keys)):
        reached[place] = keys[place] >= least
    words = reached.view(np.uint64)
    some = count = NONE
    for word in range(len(words)):
        eights[some] = np.uint64(word)
        some += np.uint64(words[word] != NONE)
    for q in range(some):
        first, left = EIGHT * eights[q], words[eights[q]]
        lowest = left & (NONE - left)
        where[count] = first + ((lowest * NUMBERED) >> LAST_BYTE)
        left ^= lowest
        lowest = left & (NONE - left)
        where[count + NEXT] = first + ((lowest * NUMBERED) >> LAST_BYTE)
        count += NEXT + np.uint64(left != NONE)
        left ^= lowest
        while left != NONE:
            lowest = left & (NONE - left)
            where[count] = first + ((lowest * NUMBERED) >> LAST_BYTE)
            count += NEXT
            left ^= lowest
    return count


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _products(x: Floats, r: int, weight: Floats, bias: Floats, where: Places, count: int, found: Floats) -> None:
    """Row r of x times the weights at the first `count` of `where`, four at a time, plus their biases."""
    d_in = x.shape[1]
    whole = count - count % 4
    for q in range(0, whole, 4):
        a, b, c, d = where[q], where[q + 1], where[q + 2], where[q + 3]
        sum_a, sum_b, sum_c, sum_d = bias[a], bias[b], bias[c], bias[d]
        for i in range(d_in):
            sum_a += x[r, i] * weight[a, i]
            sum_b += x[r, i] * weight[b, i]
            sum_c += x[r, i] * weight[c, i]
            sum_d += x[r, i] * weight[d, i]
        found[q], found[q + 1], found[q + 2], found[q + 3] = sum_a, sum_b, sum_c, sum_d
    for q in range(whole, count):
        a = where[q]
        sum_a = bias[a]
        for i in range(d_in):
            sum_a += x[r, i] * weight[a, i]
        found[q] = sum_a


@compiled()
def _take(
    found: Floats, where: Places, count: int, keys: NDArray[np.int32], chosen: Places, values: Floats, places: Ints
) -> None:
    """The largest of the first `count` numbers found, as many as `values` has room for.

    keys, chosen: scratch; STRIP more keys than `count`, one more place than values.
    """
    k = len(values)
    _float_keys(found, count, keys)
    kept = NONE
    if count <= FEW:
        few = keys[: (count + LANES - 1) // LANES * LANES]
        few[count:] = LEAST_KEY  # larger than no number
        for q in range(count):
            larger = np.int32(0)
            for other in range(len(few)):
                larger += np.int32(few[other] > few[q])
            chosen[kept] = q
            kept += np.uint64(larger < k)
    if kept != k:  # too many numbers for that, or the k-th has equals
        strips = (count + STRIP - 1) // STRIP * STRIP
        smallest = keys[0]
        for q in range(count):
            smallest = keys[q] if keys[q] < smallest else smallest
        keys[count:strips] = smallest
        least = np.int32(_threshold(keys[:strips], k, 0))
        room = k - _n_at_least(keys[:count], least + np.int32(1))  # for keys that equal the k-th
        kept = NONE
        for q in range(count):
            equal = (keys[q] == least) & (room > 0)
            room -= equal
            chosen[kept] = q
            kept += np.uint64((keys[q] > least) | equal)
    for place in range(k):
        values[place], places[place] = found[chosen[place]], np.int64(where[chosen[place]])


@compiled()
def _any_nan(numbers: Floats, count: int) -> bool:
    n_nan = np.int32(0)
    for q in range(count):
        n_nan += np.int32(numbers[q] != numbers[q])
    return bool(n_nan > 0)


@compiled()
def _poison(values: Floats, places: Ints) -> None:
    """NaN for every value of a row, so that whatever is made of them is NaN."""
    for q in range(len(values)):
        values[q], places[q] = np.nan, q
