"""The compiled loop of the rotary embedding, for float32 and for the bits of bfloat16 (`fused_neox`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.system.compiled import compiled

Values = NDArray[np.float32] | NDArray[np.uint16]

NAN = np.uint16(0x7FC0)


@compiled()
def rotate_heads(
    qkv: Values,
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    query: Values,
    key: Values,
    value: Values,
    numbers: NDArray[np.float32],
    bits: NDArray[np.uint32] | None,
) -> None:
    """Split qkv `[texts, tokens, heads x 3 x d_head]`, and rotate the first 2 half dimensions of queries and keys.

    The results are query, key and value `[texts, heads, tokens, d_head]`. cos and sin are `[tokens, half]`, numbers is
    memory for `[2 half]`. bits is None if all are float32; otherwise qkv and the results have the bits of bfloat16
    numbers, the upper halves of float32 numbers, and bits is the same memory as `numbers`.
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
                            bits[i] = np.uint32(part[i]) << np.uint32(16)
                    for i in range(half):
                        a, b = numbers[i], numbers[half + i]
                        numbers[i] = a * cosine[i] - b * sine[i]
                        numbers[half + i] = b * cosine[i] + a * sine[i]
                    for i in range(2 * half):
                        if bits is None:
                            out[i] = numbers[i]
                        else:
                            odd = (bits[i] >> np.uint32(16)) & np.uint32(1)  # round to nearest, ties to even
                            rounded = np.uint16((bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))
                            out[i] = rounded if numbers[i] == numbers[i] else NAN
                part, out = row[start + 2 * d_head : start + 3 * d_head], value[text, head, token]
                for i in range(d_head):
                    out[i] = part[i]
