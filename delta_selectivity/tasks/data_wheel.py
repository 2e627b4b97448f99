"""The data files of the tasks, contained in the PyPI wheel sae-probes (MIT).

for text, label in read_labelled("57_wikidatais_alive"):
    ...
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import zstandard

from delta_selectivity.errors import RequestError
from delta_selectivity.system.wheel import Wheel

WHEEL = Wheel(
    "sae-probes", "0.4.2", "sae_probes-0.4.2-py3-none-any.whl",
    "245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03", 45, "the data files of the tasks",
)  # fmt: skip

_FOLDER = "sae_probes/data/cleaned_data"
_COLUMNS = ("prompt", "target")


def read_labelled(stem: str) -> Iterator[tuple[str, str]]:
    """Yield (text, label) of each row of a data file, given without suffix. Raises as `open_data`."""
    with (
        open_data(f"{_FOLDER}/{stem}.csv.zst") as packed,
        zstandard.open(packed, "rt", encoding="utf-8", newline="") as file,
    ):
        reader = csv.reader(file)
        header = next(reader, [])
        missing = [column for column in _COLUMNS if column not in header]
        if missing:
            raise RequestError(f"{stem} of {WHEEL.distribution} has no column {missing[0]!r}: {WHEEL.install_command}")
        text, label = (header.index(column) for column in _COLUMNS)
        for record in reader:
            yield record[text], record[label]


def open_data(name: str) -> AbstractContextManager[BinaryIO]:
    """Open a data file by its path in the wheel. Raises `RequestError` if it is neither cached nor downloadable."""
    return WHEEL.open(name)


def is_local() -> bool:
    """Return whether the data files are on this machine, without downloading."""
    return WHEEL.is_local()


def fetch() -> Path:
    """Return the path of the wheel, downloading it if necessary. Raises `RequestError`."""
    return WHEEL.fetch()
