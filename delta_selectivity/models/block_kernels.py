"""Compiled loops of a decoder's blocks on a CPU: causal softmax, rotary embedding and layer norms.

A bfloat16 number is given as its bits, the upper half of a float32 number. Sums are float32, and each result is rounded
once, to the nearest, ties to even. `attention` and `fused_neox` call the loops.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.system.compiled import compiled

Bits = NDArray[np.uint16]
Floats = NDArray[np.float32]

_U32 = np.uint32  # around every operation: Numba's sum of two 32-bit integers has 64 bits, so half as many fit a vector
_LOG2_E = np.float32(math.log2(math.e))
_ROUND = np.float32(3 * 2.0**22)  # float32 numbers of this size are whole; their last bits are those of the integer
_LEAST = np.float32(-126)  # exponent of the smallest normal number
_P0, _P1, _P2, _P3, _P4, _P5 = (np.float32(math.log(2) ** k / math.factorial(k)) for k in range(6))
_SIGN, _ALL_BUT_SIGN = np.int32(31), np.int32(0x7FFFFFFF)


@compiled()
def widened(bits: np.uint16) -> np.float32:
    """Return a bfloat16 number as float32."""
    return _U32(_U32(bits) << _U32(16)).view(np.float32)


@compiled()
def rounded(value: np.float32) -> np.uint16:
    """Return the bits of the nearest bfloat16 number, also for NaN that was computed from bfloat16 numbers."""
    bits = np.float32(value).view(np.uint32)
    odd = _U32(_U32(bits >> _U32(16)) & _U32(1))
    return np.uint16(_U32(_U32(bits + _U32(0x7FFF)) + odd) >> _U32(16))


@compiled(fastmath={"nsz", "contract"})
def causal_softmax(scores: Bits, factor: np.float32, values: Floats) -> None:
    """Replace scores `[n, tokens, tokens]` by the softmax of factor x score over the tokens up to each; 0 after it.

    values is memory for `[tokens]` numbers. A row with NaN, or whose largest score is infinite, becomes NaN.
    """
    n, n_tokens, _ = scores.shape
    factor = factor * _LOG2_E
    for matrix in range(n):
        for token in range(n_tokens):  # all zeros first: writing them next to the shares takes longer
            for i in range(np.uint64(token + 1), np.uint64(n_tokens)):
                scores[matrix, token, i] = 0
        for token in range(n_tokens):
            seen = token + 1
            largest = _largest(scores, matrix, token, seen)
            for i in range(seen):
                values[i] = _power_of_2((widened(scores[matrix, token, i]) - largest) * factor)
            share = np.float32(1) / _sum(values, seen)
            for i in range(seen):
                scores[matrix, token, i] = rounded(values[i] * share)


@compiled()
def _largest(scores: Bits, matrix: int, token: int, n: int) -> np.float32:
    """Return the largest of the first n scores of a token; of NaN, any."""
    # integers in the order of the numbers, because a loop that compares floats is not vectorised
    found = np.int32(-(2**31))
    for i in range(n):
        bits = np.int32(_U32(scores[matrix, token, i]) << _U32(16))
        found = max(found, np.int32(bits ^ ((bits >> _SIGN) & _ALL_BUT_SIGN)))
    return np.int32(found ^ ((found >> _SIGN) & _ALL_BUT_SIGN)).view(np.float32)


@compiled(fastmath={"reassoc"})
def _sum(values: Floats, n: int) -> np.float32:
    """Return the sum of the first n values."""
    total = np.float32(0)
    for i in range(n):
        total += values[i]
    return total


@compiled(fastmath={"nsz", "contract"})
def _power_of_2(x: np.float32) -> np.float32:
    """Return 2^x for x up to 0: 2^n 2^f, n whole and f in [-1/2, 1/2], where 2^f is its Taylor polynomial."""
    x = _LEAST if x < _LEAST else x
    whole = x + _ROUND
    f = x - (whole - _ROUND)
    power = np.float32(_P0 + f * (_P1 + f * (_P2 + f * (_P3 + f * (_P4 + f * _P5))))).view(np.uint32)
    exponent = _U32(np.float32(whole if x == x else _ROUND).view(np.uint32) << _U32(23))
    return _U32(power + exponent).view(np.float32)


@compiled(fastmath={"reassoc", "contract"})
def layer_norms(x: Bits, eps: np.float32, weights: Bits, biases: Bits, results: Bits, row: Floats) -> None:
    """Write layer norms of the same x `[n, d]`: weight x (x - mean) / sqrt(variance + eps) + bias.

    weights and biases are `[norms, d]`, results is `[norms, n, d]`, row is memory for `[d]` numbers.
    """
    n, d = x.shape
    for i in range(n):
        total = np.float32(0)
        for j in range(d):
            row[j] = widened(x[i, j])
            total += row[j]
        mean, squares = total / np.float32(d), np.float32(0)
        for j in range(d):
            row[j] -= mean
            squares += row[j] * row[j]
        scale = np.float32(1) / np.sqrt(squares / np.float32(d) + eps)
        for k in range(len(weights)):
            for j in range(d):
                results[k, i, j] = rounded(row[j] * scale * widened(weights[k, j]) + widened(biases[k, j]))


@compiled()
def rotate_heads(
    qkv: Floats | Bits,
    cos: Floats,
    sin: Floats,
    query: Floats | Bits,
    key: Floats | Bits,
    value: Floats | Bits,
    numbers: Floats,
    bits: NDArray[np.uint32] | None,
) -> None:
    """Split qkv `[texts, tokens, heads x 3 x d_head]`, and rotate the first 2 half dimensions of queries and keys.

    The results are query, key and value `[texts, heads, tokens, d_head]`. cos and sin are `[tokens, half]`, numbers is
    memory for `[2 half]`. bits is None if all are float32; if qkv and the results are bfloat16, it is the same memory
    as `numbers`.
    """
    n_texts, n_heads, n_tokens, d_head = query.shape
    half = cos.shape[1]
    for text in range(n_texts):
        for token in range(n_tokens):
            row, cosine, sine = qkv[text, token], cos[token], sin[token]
            for head in range(n_heads):
                start = 3 * d_head * head
                for is_key in range(2):
                    part = row[start + is_key * d_head : start + (is_key + 1) * d_head]
                    out = key[text, head, token] if is_key else query[text, head, token]
                    for i in range(d_head):  # a loop: assigning slices takes twice as long
                        out[i] = part[i]
                    for i in range(2 * half):
                        if bits is None:
                            numbers[i] = part[i]
                        else:
                            bits[i] = _U32(part[i]) << _U32(16)
                    for i in range(half):
                        a, b = numbers[i], numbers[half + i]
                        numbers[i] = a * cosine[i] - b * sine[i]
                        numbers[half + i] = b * cosine[i] + a * sine[i]
                    for i in range(2 * half):
                        out[i] = numbers[i] if bits is None else rounded(numbers[i])
                part, out = row[start + 2 * d_head : start + 3 * d_head], value[text, head, token]
                for i in range(d_head):
                    out[i] = part[i]
