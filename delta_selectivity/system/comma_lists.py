r"""Names in one string, with commas between them.

>>> parse_names(r"a, b\,c")
['a', 'b,c']
"""

from __future__ import annotations

import re
from collections.abc import Iterable


def parse_names(spec: str) -> list[str]:
    """The names between the commas; a comma after a backslash is part of a name."""
    parts = re.split(r"(?<!\\),", spec)
    return [name for part in parts if (name := part.replace("\\,", ",").strip())]


def join_names(names: Iterable[str]) -> str:
    """Names as `parse_names` reads them."""
    return ",".join(name.replace(",", "\\,") for name in names)
