r"""Comma-separated lists of names in one string.

>>> parse_names(r"a, b\,c")
['a', 'b,c']
"""

from __future__ import annotations

import re
from collections.abc import Iterable


def parse_names(spec: str) -> list[str]:
    """Split a string at its commas; a comma after a backslash belongs to the name."""
    parts = re.split(r"(?<!\\),", spec)
    return [name for part in parts if (name := part.replace("\\,", ",").strip())]


def join_names(names: Iterable[str]) -> str:
    """Join names so that `parse_names` splits them again."""
    return ",".join(name.replace(",", "\\,") for name in names)
