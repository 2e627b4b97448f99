"""The texts that a run stores for its rows."""

from __future__ import annotations

from collections.abc import Collection

from delta_selectivity.records.texts import of_dataset, to_bytes
from delta_selectivity.run.rows import RowTable
from delta_selectivity.tasks import ProbeTexts


def kept_texts(texts: ProbeTexts, rows: RowTable, datasets: Collection[int], keep_texts: str) -> dict[int, bytes]:
    """Return the content of the text files by dataset index, for datasets that store one."""
    return {
        index: to_bytes(of_dataset(texts, texts.datasets[index], rows.count))
        for index in datasets
        if keep_texts == "all" or (keep_texts == "public" and texts.datasets[index].is_public)
    }
