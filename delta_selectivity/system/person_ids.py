"""Numeric ids of people or other groups, and the rules by which two spellings are the same one.

    person_ids(["Ada Lovelace", "1", "1.0", "007"])    # the second and third are one person

Equal numbers are one person in any notation: 1, `1`, `1.0`. Numbers with leading zeros are distinct, since they may be
codes. Texts are compared in Unicode form NFKC, so that composed and combining accents, and full-width and normal
letters, are the same; case is significant. NFKC rather than NFC, because one person on both sides of a split is worse
than two people in one fold.
"""

from __future__ import annotations

import numbers
import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Matches 1, -2.50 and 1e+16, as programs write numbers; not 007, 1e3 or 0x1f, which may be codes.
_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]*)(\.[0-9]+)?(e\+[0-9]{1,3})?", re.IGNORECASE)
_MAX_LENGTH = 300  # characters of a number: Python refuses to print integers with thousands of digits


def group_key(value: Any) -> str:
    """Return the key of a group: equal for equal numbers and for all Unicode forms of a name."""
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    if isinstance(value, numbers.Integral) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    text = unicodedata.normalize("NFKC", str(value)).strip()
    return number_key(text) or text


def number_key(text: str) -> str | None:
    """Return the shortest notation of a number, such as '1' for '+1.0'; None if the text is not a plain number."""
    if len(text) > _MAX_LENGTH or not _NUMBER.fullmatch(text):
        return None
    number = Decimal(text)
    exact = format(number.to_integral_value() if number == number.to_integral_value() else number, "f")
    shown = exact.rstrip("0").rstrip(".") if "." in exact else exact
    return "0" if shown in {"-0", ""} else shown


def person_ids(keys: Iterable[Any]) -> NDArray[np.int64]:
    """Return 64 bits of the hash of each key's `group_key`, int64 [keys], independent of the other keys."""
    return np.array([_hash(group_key(key)) for key in keys], dtype=np.int64)


def _hash(key: str) -> int:
    digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
