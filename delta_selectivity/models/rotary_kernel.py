"""The compiled loop of the rotary embedding, in place, for float32 and for the bits of bfloat16 (`fused_neox`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.system.compiled import compiled

NAN = np.uint16(0x7FC0)


@compiled()
def rotate_heads(
    qkv: NDArray[np.float32] | NDArray[np.uint16],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    d_head: int,
    values: NDArray[np.float32],
    bits: NDArray[np.uint32] | None,
) -> None:
    """Rotate the first 2 half dimensions of queries and keys in qkv `[texts, tokens, heads x 3 x d_head]`.

    cos and sin are `[tokens, half]`, values is memory for `[2 half]` numbers. bits is None if qkv is float32; otherwise
    qkv has the bits of bfloat16 numbers, the upper halves of float32 numbers, and bits is the same memory as values.
    """
    n_texts, n_tokens, width = qkv.shape
    half = cos.shape[1]
    for text in range(n_texts):
        for token in range(n_tokens):
            row = qkv[text, token]
            for head in range(width // d_head):
                if head % 3 == 2:  # a value
                    continue
                part = row[head * d_head : head * d_head + 2 * half]
                for i in range(2 * half):
                    if bits is None:
                        values[i] = part[i]
                    else:
                        bits[i] = np.uint32(part[i]) << np.uint32(16)
                for i in range(half):
                    a, b, c, s = values[i], values[half + i], cos[token, i], sin[token, i]
                    values[i] = a * c - b * s
                    values[half + i] = b * c + a * s
                for i in range(2 * half):
                    if bits is None:
                        part[i] = values[i]
                    else:
                        odd = (bits[i] >> np.uint32(16)) & np.uint32(1)  # round to nearest, ties to even
                        rounded = np.uint16((bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))
                        part[i] = rounded if values[i] == values[i] else NAN
