"""Row-wise kernels of TopK encoding on a CPU, compiled by Numba.

Every kernel works row by row, so a row's result does not depend on its company, and lets other threads run meanwhile.
A row that holds NaN gets NaN for all of its values.

Numbers are compared as integers, their *keys*. A float32 number's key is the integer of its bits, with those below the
sign turned over if it is negative: keys are in the order of the numbers, -0 below 0. Those of what an entry may be are
whole units of a size that makes 16 bits enough, so that an instruction compares twice as many. The k-th largest key is
found by bisection: counting how many of a hundred keys reach another takes some ten instructions.

A row is divided into groups. Where k or more of the groups' maxima reach a threshold, so do the k largest entries.

What is left of some rows is found before any of it is rescored: guesses and weights do not take the cache from each
other.

Inside a loop over rows nothing is sliced, viewed or made: for Numba each is two atomic operations or an allocation.

All in one file: what Numba keeps on disk it makes anew when its own file changes, not when one that it calls into does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.system.compiled import compiled

GROUPS_PER_K = 4  # at least: with 2 there are more members to look at, with 8 more maxima: either takes longer
LARGEST_GROUP = 64  # in wide rows looking at a maximum costs less than looking at members
EIGHT, LAST_BYTE = np.uint64(8), np.uint64(56)  # bytes in a word of 64 bits; the bits below its last byte
NUMBERED = np.uint64(0x0001020304050607)  # times a word with a 1 in byte j, its last byte is j
NONE, NEXT, FOUR = np.uint64(0), np.uint64(1), np.uint64(4)
KEYS = 2**15  # of rows whose largest are known before they are rescored: they stay in the cache
STRIP = 64  # so many keys are compared in a row of instructions: of any other number it takes a loop and its rest
LARGEST_STEP = np.float32(127)  # what a signed byte holds
LARGEST_UNITS, LEAST_KEY, MOST_KEY = np.float32(32000), np.int16(-(2**15)), np.int16(2**15 - 1)
UNITS_OFF = np.float32(1)  # more than float32 rounds in reckoning them, and more than rounding changed before
ROUND_SUM = np.float32(2.0**-23)  # of one float32 addition or product, twice
LEAST = np.float32(1e-30)  # that the inverse of which is a number
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
LARGEST_KEY = np.int32(2**31 - 1)

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Places = NDArray[np.uint64]  # an index that may be negative takes Numba a comparison more
Steps = NDArray[np.int32]
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
            _poison(values, places, r * k, k)
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
    """Inputs on a grid of 255 steps, each row on its own, and what is to be known of how far off they are.

    Args:
        x: ``[rows, d_in]``.
        centre: what is taken off each row ``[d_in]``.
        column: what each column is then multiplied by ``[d_in]``.
        size: largest norm of a weight.

    Returns:
        The steps ``[rows, d_in]``; and ``[rows, 4]``: a row's step, the norm of what it lost, its norm on the grid, and
        the size of what is summed in its products. Where x holds NaN or Inf, some of these do.
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
            most = max(most, bits[i] & np.int32(0x7FFFFFFF))  # absolute numbers are in the order of their bits
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
    """The k largest entries of x weightᵀ + bias in each row, given products of the rounded, and their places.

    By the rounded, an entry is its product times the steps of its row and its latent, plus the centre's pre-activation.
    It is off by at most |lost of the row| |latent| + |row on the grid| |lost of the latent|, and by what float32 sums
    are off: so there is a largest number that it may be. The k of which that is largest are computed. Others are among
    the k largest only if that reaches the k-th of these; they are computed too.

    Args:
        proposed: products of the steps of rows and latents ``[rows, d]``.
        inputs: of each row, as from `quantise` ``[rows, 4]``.
        latents: of each latent its step, its pre-activation of the centre, its norm, and that of what it lost
            ``[4, d]``.
        x: ``[rows, d_in]``.
        weight: ``[d, d_in]``.
        bias: ``[d]``.
        k: how many, at most d.
        values: where the values go, which are sums in float32 ``[rows * k + 1]``. The last is scratch.
        places: where their places go, in the same order, which is none ``[rows * k + 1]``.
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
            units[g] = _largest_they_may_be(proposed, inputs, latents, largest, start + g, x.shape[1], keys, g)
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
            asked = np.int16(np.int32(np.floor(least[0] * units[g])))
            if asked < sure[g]:
                below = np.int16(sure[g] - np.int16(1))
                more = _between(keys, g, asked, below, reached, words, eights, where, count)
                _products(x, start + g, weight, bias, where, count, count + more, found)
                count += more
            n_nan = np.int32(0)
            if not units[g] > ZERO:
                for q in range(count):
                    n_nan += np.int32(found[q] != found[q])
            if n_nan > 0:
                _poison(values, places, (start + g) * k, k)
            else:
                _take(found, found_bits, found_keys, where, count, values, places, (start + g) * k, k)


@compiled()
def _largest_they_may_be(
    proposed: Steps,
    inputs: Floats,
    latents: Floats,
    largest: tuple[np.float32, np.float32, np.float32],
    r: int,
    d_in: int,
    keys: NDArray[np.int16],
    row: int,
) -> np.float32:
    """What each entry of row r may be, in units rounded up, into a row of `keys`; how many units a 1 is.

    0 where there is NaN or Inf in x or in a weight: any of them may be anything then.

    largest: of the latents' pre-activations of the centre, norms and losses.
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
    """The largest key of each of k or more groups of a row into the first strips of `highest`; how many strips.

    The second half of what is left is held against the first until there are few enough.
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
    """Into `where`, from `start` on, the places of a row's keys from `least` to `most`; how many.

    where: it has room for two more.
    reached, eights: scratch; words: that of `reached`, eight keys in one, which are passed over if it is none of them.
    Branches depend on where more than two of eight are, which is rare.
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
    """Row r of x times the weights at `where`, start to stop, four at a time, plus their biases, into `found`."""
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
    """The k largest of the first `count` numbers found into values and places from `slot` on.

    What is in the slot after these is of no more use.

    bits: those of `found`; keys: scratch, STRIP more than `count`; where: of the numbers.
    """
    least = _kth_key(bits, count, keys, k)
    free, end = np.uint64(slot), np.uint64(slot + k)
    for q in range(count):
        values[free], places[free] = found[q], np.int64(where[q])
        free += np.uint64(keys[q] > least)
    for q in range(count):  # those that equal the k-th, as long as there is room
        if free == end:
            return
        values[free], places[free] = found[q], np.int64(where[q])
        free += np.uint64(keys[q] == least)


@compiled()
def _kth_key(bits: NDArray[np.int32], count: np.uint64, keys: NDArray[np.int32], k: int) -> np.int32:
    """The k-th largest key of the first `count` numbers of these bits; their keys go into `keys`."""
    smallest = LARGEST_KEY
    for q in range(count):
        keys[q] = bits[q] ^ ((bits[q] >> np.int32(31)) & np.int32(0x7FFFFFFF))
        smallest = keys[q] if keys[q] < smallest else smallest
    strips = _filled(keys, int(count), smallest)
    return np.int32(_threshold(keys, strips, k, 0))


@compiled()
def _poison(values: Floats, places: Ints, slot: int, k: int) -> None:
    """NaN for every value of a row, so that whatever is made of them is NaN."""
    for q in range(k):
        values[slot + q], places[slot + q] = np.nan, q
