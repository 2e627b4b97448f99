"""Row-wise kernels of TopK encoding on a CPU, compiled by Numba.

Every kernel processes rows independently, so a row's result does not depend on the other rows, and releases the GIL.
All values of a row that holds NaN become NaN.

Numbers are compared as integers, called *keys*. The key of a float32 number is the integer of its bits, with the bits
below the sign inverted if it is negative: keys have the order of the numbers, with -0 below 0. Upper bounds of entries
have int16 keys in whole units of a suitable size, so that one instruction compares twice as many. The k-th largest key
is found by bisection: counting how many of a hundred keys reach another takes about ten instructions.

A row is divided into groups. If the maxima of k or more groups reach a threshold, so do the k largest entries.

Candidates are selected for several rows before any of them is rescored, so that bounds and weights do not evict each
other from the cache.

Loops over rows contain no slices, views or allocations: in Numba each slice or view costs two atomic operations.

All kernels are in one file, because Numba's disk cache notices changes of the kernel's own file only, not of the files
that it calls into.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.system.compiled import compiled

GROUPS_PER_K = 4  # minimum: 2 leaves more members to scan, 8 more maxima; both are slower
LARGEST_GROUP = 64  # in wide rows scanning maxima is cheaper than scanning members
EIGHT, LAST_BYTE = np.uint64(8), np.uint64(56)  # bytes in a 64-bit word; shift that leaves its highest byte
NUMBERED = np.uint64(0x0001020304050607)  # multiplied by a word with a 1 in byte j, gives j in the highest byte
NONE, NEXT, FOUR = np.uint64(0), np.uint64(1), np.uint64(4)
KEYS = 2**15  # keys of the rows processed together: few enough to stay in the cache
STRIP = 64  # keys compared without a branch: a fixed number avoids a remainder loop
LARGEST_STEP = np.float32(127)  # int8 range
LARGEST_UNITS, LEAST_KEY, MOST_KEY = np.float32(32000), np.int16(-(2**15)), np.int16(2**15 - 1)
UNITS_OFF = np.float32(1)  # exceeds the float32 rounding error of a bound in units
ROUND_SUM = np.float32(2.0**-23)  # twice the relative rounding error of a float32 operation
LEAST = np.float32(1e-30)  # smallest divisor whose inverse is finite
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
LARGEST_KEY = np.int32(2**31 - 1)

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Places = NDArray[np.uint64]  # unsigned: Numba adds a comparison for indices that may be negative
Steps = NDArray[np.int32]
Keys = NDArray[np.int16] | NDArray[np.int32]


@compiled()
def k_largest(rows: Floats, k: int) -> tuple[Floats, Ints]:
    """Return the k largest entries of each row, unordered, and their columns.

    Args:
        rows: ``[rows, d]``.
        k: how many, at most d.

    Returns:
        Values and columns, both ``[rows, k]``.
    """
    n, d = rows.shape
    values, places = np.empty(n * k + 1, np.float32), np.empty(n * k + 1, np.int64)  # `_take` writes one element more
    keys, highest = np.empty((1, d), np.int32), np.empty(d + STRIP, np.int32)
    words = np.zeros((d + 7) // 8, np.uint64)
    reached, eights = words.view(np.uint8), np.empty(len(words) + 1, np.uint64)
    found, where = np.empty(d, np.float32), np.empty(d + 2, np.uint64)
    found_bits, found_keys = found.view(np.int32), np.empty(d + STRIP, np.int32)
    bits = rows.view(np.int32)
    for r in range(n):
        n_nan = np.int32(0)
        for q in range(d):
            n_nan += np.int32(rows[r, q] != rows[r, q])
            keys[0, q] = bits[r, q] ^ ((bits[r, q] >> np.int32(31)) & np.int32(0x7FFFFFFF))
        if n_nan > 0:
            _fill_with_nan(values, places, r * k, k)
            continue
        strips = _group_maxima(keys, 0, highest, k)
        least = np.int32(_threshold(highest, strips, k, k // 8))
        count = _between(keys, 0, least, LARGEST_KEY, reached, words, eights, where, NONE)
        for q in range(count):
            found[q] = rows[r, where[q]]
        _take(found, found_bits, found_keys, where, count, values, places, r * k, k)
    return values[:-1].reshape(n, k), places[:-1].reshape(n, k)


@compiled(fastmath={"reassoc", "contract", "nsz"})
def quantise(x: Floats, centre: Floats, column: Floats, size: float) -> tuple[NDArray[np.int8], Floats]:
    """Quantise each row with its own step to 255 levels, and compute what bounds the rounding error.

    Args:
        x: ``[rows, d_in]``.
        centre: subtracted from each row ``[d_in]``.
        column: factor of each column after that ``[d_in]``.
        size: largest norm of a weight.

    Returns:
        The quantised rows ``[rows, d_in]``; and per row ``[rows, 4]``: the step, the norm of the rounding error, the
        norm of the quantised row, and the magnitude of the terms in its products. Where x holds NaN or Inf, so do some
        of these.
    """
    n, d = x.shape
    steps, facts = np.empty((n, d), np.int8), np.empty((n, 4), np.float32)
    y, largest = np.empty(d, np.float32), np.empty(1, np.float32)
    bits, largest_bits = y.view(np.int32), largest.view(np.int32)
    centre_size = np.sqrt((centre * centre).sum())
    for r in range(n):
        most = np.int32(0)
        for i in range(d):
            y[i] = (x[r, i] - centre[i]) * column[i]
            most = max(most, bits[i] & np.int32(0x7FFFFFFF))  # bits of absolute values sort like the values
        largest_bits[0] = most
        step = largest[0] / LARGEST_STEP
        per_step = ONE / step if step > ZERO else ZERO
        of_x = of_grid = of_loss = ZERO
        for i in range(d):
            rounded = np.rint(y[i] * per_step)
            steps[r, i] = np.int8(np.int32(rounded))
            of_x += x[r, i] * x[r, i]
            of_grid += rounded * rounded
            of_loss += (y[i] - rounded * step) * (y[i] - rounded * step)
        facts[r, 0], facts[r, 1], facts[r, 2] = step, np.sqrt(of_loss), np.sqrt(of_grid) * step
        facts[r, 3] = (np.sqrt(of_x) + centre_size) * size
    return steps, facts


@compiled()
def k_largest_of_proposed(
    proposed: Steps,
    inputs: Floats,
    latents: Floats,
    x: Floats,
    weight: Floats,
    bias: Floats,
    k: int,
    values: Floats,
    places: Ints,
) -> None:
    """Find the k largest entries of x weightᵀ + bias in each row, given the quantised products, and their columns.

    The quantised product estimates an entry as the integer product times the steps of its row and its latent, plus the
    pre-activation of the centre. Its error is at most |row error| |latent| + |quantised row| |latent error|, plus the
    rounding of float32 sums. This bounds every entry from above. The k entries with the largest bounds are computed.
    Any other entry can be among the k largest only if its bound reaches the k-th of these values; those are computed
    too.

    Args:
        proposed: integer products of quantised rows and latents ``[rows, d]``.
        inputs: per row, as returned by `quantise` ``[rows, 4]``.
        latents: per latent, its step, its pre-activation of the centre, its norm, and the norm of its rounding error
            ``[4, d]``.
        x: ``[rows, d_in]``.
        weight: ``[d, d_in]``.
        bias: ``[d]``.
        k: how many, at most d.
        values: output for the values, float32 sums ``[rows * k + 1]``. The last element is scratch.
        places: output for the columns, in the same (arbitrary) order ``[rows * k + 1]``.
    """
    n, d = proposed.shape
    together = max(1, min(n, KEYS // d))
    keys, highest = np.empty((together, d), np.int16), np.empty(d + STRIP, np.int16)
    words = np.zeros((d + 7) // 8, np.uint64)
    reached, eights = words.view(np.uint8), np.empty(len(words) + 1, np.uint64)
    first_where, first_found = np.empty(together * d + 2, np.uint64), np.empty(together * d, np.float32)
    stops, units, sure = np.zeros(together + 1, np.uint64), np.empty(together, np.float32), np.empty(together, np.int16)
    where, found, found_keys = np.empty(d + 2, np.uint64), np.empty(d, np.float32), np.empty(d + STRIP, np.int32)
    found_bits, least = found.view(np.int32), np.empty(1, np.float32)
    least_bits = least.view(np.int32)
    largest = np.abs(latents[1]).max(), latents[2].max(), latents[3].max()
    for start in range(0, n, together):
        rows = min(together, n - start)
        for g in range(rows):
            units[g] = _upper_bounds(proposed, inputs, latents, largest, start + g, x.shape[1], keys, g)
            sure[g] = LEAST_KEY
            if units[g] > ZERO:
                sure[g] = _threshold(highest, _group_maxima(keys, g, highest, k), k, k // 8)
            end = stops[g]
            stops[g + 1] = end + _between(keys, g, sure[g], MOST_KEY, reached, words, eights, first_where, end)
        for g in range(rows):
            _products(x, start + g, weight, bias, first_where, stops[g], stops[g + 1], first_found)
        for g in range(rows):
            count = stops[g + 1] - stops[g]
            for q in range(count):
                where[q], found[q] = first_where[stops[g] + q], first_found[stops[g] + q]
            kth = _kth_key(found_bits, count, found_keys, k)
            least_bits[0] = kth ^ ((kth >> np.int32(31)) & np.int32(0x7FFFFFFF))
            needed = np.int16(np.int32(np.floor(least[0] * units[g])))
            if needed < sure[g]:
                below = np.int16(sure[g] - np.int16(1))
                more = _between(keys, g, needed, below, reached, words, eights, where, count)
                _products(x, start + g, weight, bias, where, count, count + more, found)
                count += more
            n_nan = np.int32(0)
            if not units[g] > ZERO:
                for q in range(count):
                    n_nan += np.int32(found[q] != found[q])
            if n_nan > 0:
                _fill_with_nan(values, places, (start + g) * k, k)
            else:
                _take(found, found_bits, found_keys, where, count, values, places, (start + g) * k, k)


@compiled()
def _upper_bounds(
    proposed: Steps,
    inputs: Floats,
    latents: Floats,
    largest: tuple[np.float32, np.float32, np.float32],
    r: int,
    d_in: int,
    keys: NDArray[np.int16],
    row: int,
) -> np.float32:
    """Write upper bounds of row r's entries, in whole units, into a row of `keys`; return the number of units per 1.

    Return 0 if x or a weight holds NaN or Inf: then there is no bound. ``largest`` holds the maxima over latents of the
    pre-activation of the centre, the norm and the rounding error.
    """
    step, loss, size = inputs[r, 0], inputs[r, 1], inputs[r, 2]
    off = ROUND_SUM * np.float32(d_in // 2 + 2) * (inputs[r, 3] + largest[0])
    most = largest[0] + (size + loss) * largest[1] + TWO * size * largest[2] + off
    if not np.isfinite(most):
        for q in range(keys.shape[1]):
            keys[row, q] = LEAST_KEY
        return ZERO
    unit = LARGEST_UNITS / max(most, LEAST)
    step, loss, size, off = step * unit, loss * unit, size * unit, off * unit + UNITS_OFF
    for q in range(keys.shape[1]):
        product = np.float32(proposed[r, q]) * (latents[0, q] * step)
        most_off = latents[2, q] * loss + latents[3, q] * size + off
        keys[row, q] = np.int16(np.int32(latents[1, q] * unit + product + most_off))
    return unit


@compiled()
def _group_maxima(keys: Keys, row: int, highest: Keys, k: int) -> int:
    """Write the largest key of each of k or more groups of a row into `highest`; return how many strips it fills.

    The row is folded in half, by the maximum of both halves, until few enough groups are left.
    """
    groups = keys.shape[1]
    enough = max(GROUPS_PER_K * k, groups // LARGEST_GROUP)
    if groups < 2 * enough:
        for g in range(groups):
            highest[g] = keys[row, g]
    else:
        half = groups // 2
        for g in range(half):
            highest[g] = keys[row, g] if keys[row, g] > keys[row, half + g] else keys[row, half + g]
        if groups % 2:
            highest[0] = max(highest[0], keys[row, groups - 1])
        groups = half
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
    """Return how many strips the first `count` keys take, and pad the last strip with the smallest key."""
    strips = (count + STRIP - 1) // STRIP
    for q in range(count, strips * STRIP):
        keys[q] = smallest
    return strips


@compiled()
def _threshold(keys: Keys, strips: int, k: int, slack: int) -> int:
    """Return a key that at least k keys of the first `strips` reach, and at most k + `slack` unless more equal it."""
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
            counted = keys.dtype.type(0)  # counted in the keys' dtype: a wider one compares fewer at a time
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
def _between(
    keys: Keys,
    row: int,
    least: np.int16 | np.int32,
    most: np.int16 | np.int32,
    reached: NDArray[np.uint8],
    words: Places,
    eights: Places,
    where: Places,
    start: np.uint64,
) -> np.uint64:
    """Write the columns of a row's keys from `least` to `most` into `where`, beginning at `start`; return how many.

    The inner loop branches on the data only for words with more than two matches, which are rare.

    Args:
        keys: ``[rows, d]``.
        row: the row to search.
        least: smallest key that matches.
        most: largest key that matches.
        reached: scratch, one byte per key.
        words: `reached` viewed as 64-bit words of eight keys; words without a match are skipped.
        eights: scratch for the indices of the other words.
        where: output; needs space for two more.
        start: index of the first output.
    """
    for place in range(keys.shape[1]):
        reached[place] = (keys[row, place] >= least) & (keys[row, place] <= most)
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
    x: Floats, r: int, weight: Floats, bias: Floats, where: Places, start: np.uint64, stop: np.uint64, found: Floats
) -> None:
    """Write row r of x times the weights at `where[start:stop]`, plus their biases, into `found`, four at a time."""
    d_in = x.shape[1]
    whole = stop - (stop - start) % FOUR
    for p in range(start, whole, FOUR):
        a, b, c, d = where[p], where[p + NEXT], where[p + NEXT + NEXT], where[p + NEXT + NEXT + NEXT]
        sum_a, sum_b, sum_c, sum_d = bias[a], bias[b], bias[c], bias[d]
        for i in range(d_in):
            sum_a += x[r, i] * weight[a, i]
            sum_b += x[r, i] * weight[b, i]
            sum_c += x[r, i] * weight[c, i]
            sum_d += x[r, i] * weight[d, i]
        found[p], found[p + NEXT], found[p + NEXT + NEXT], found[p + NEXT + NEXT + NEXT] = sum_a, sum_b, sum_c, sum_d
    for p in range(whole, stop):
        a = where[p]
        sum_a = bias[a]
        for i in range(d_in):
            sum_a += x[r, i] * weight[a, i]
        found[p] = sum_a


@compiled()
def _take(
    found: Floats,
    bits: NDArray[np.int32],
    keys: NDArray[np.int32],
    where: Places,
    count: np.uint64,
    values: Floats,
    places: Ints,
    slot: int,
    k: int,
) -> None:
    """Write the k largest of the first `count` numbers into values and places, from index `slot` on.

    The element after these k is overwritten.

    Args:
        found: the numbers.
        bits: `found` viewed as integers.
        keys: scratch, at least STRIP longer than `count`.
        where: the numbers' columns.
        count: how many numbers there are.
        values: output for the values.
        places: output for the columns.
        slot: index of the first output.
        k: how many to write.
    """
    least = _kth_key(bits, count, keys, k)
    free, end = np.uint64(slot), np.uint64(slot + k)
    for q in range(count):
        values[free], places[free] = found[q], np.int64(where[q])
        free += np.uint64(keys[q] > least)
    for q in range(count):  # fill the rest with entries equal to the k-th
        if free == end:
            return
        values[free], places[free] = found[q], np.int64(where[q])
        free += np.uint64(keys[q] == least)


@compiled()
def _kth_key(bits: NDArray[np.int32], count: np.uint64, keys: NDArray[np.int32], k: int) -> np.int32:
    """Return the k-th largest key of the first `count` numbers with these bits, and write their keys into `keys`."""
    smallest = LARGEST_KEY
    for q in range(count):
        keys[q] = bits[q] ^ ((bits[q] >> np.int32(31)) & np.int32(0x7FFFFFFF))
        smallest = keys[q] if keys[q] < smallest else smallest
    strips = _filled(keys, int(count), smallest)
    return np.int32(_threshold(keys, strips, k, 0))


@compiled()
def _fill_with_nan(values: Floats, places: Ints, slot: int, k: int) -> None:
    """Set all values of a row to NaN, so that everything computed from them is NaN."""
    for q in range(k):
        values[slot + q], places[slot + q] = np.nan, q
