"""The texts that a run stores for its rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from delta_selectivity.records.texts import of_dataset, to_bytes
from delta_selectivity.run.rows import RowTable
from delta_selectivity.tasks import ProbeTexts


def kept_texts(texts: ProbeTexts, rows: RowTable, keep_texts: str) -> Callable[[int], bytes | None]:
    """Return a function from a dataset's index to the content of its file of texts, or None if it stores none.

    The content is made at the first call for a dataset: compressing all before the run would keep both threads waiting.
    """

    @cache
    def content(index: int) -> bytes | None:
        dataset = texts.datasets[index]
        if keep_texts == "all" or (keep_texts == "public" and dataset.is_public):
            return to_bytes(of_dataset(texts, dataset, rows.count))
        return None

    return content
