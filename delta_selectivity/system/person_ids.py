"""Numbers that stand for people."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray


def person_ids(keys: Iterable[str]) -> NDArray[np.int64]:
    """Return 64 bits of each key's hash, int64 [keys]: one key, one id, whatever other keys there are."""
    return np.array([_hash(key) for key in keys], dtype=np.int64)


def _hash(key: str) -> int:
    digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
