"""What a run keeps of the texts of its rows."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from delta_selectivity.records.texts import KeptTexts, Text, to_bytes
from delta_selectivity.run.rows import RowTable
from delta_selectivity.tasks import Dataset, ProbeTexts, dataset_fingerprint


def kept_texts(texts: ProbeTexts, rows: RowTable, datasets: Collection[int], keep_texts: str) -> dict[int, bytes]:
    """Return the content of the file of texts of each of these datasets that keeps one, by its index."""
    return {
        index: to_bytes(as_kept(texts, texts.datasets[index], rows))
        for index in datasets
        if keep_texts == "all" or (keep_texts == "public" and texts.datasets[index].is_public)
    }


def as_kept(texts: ProbeTexts, dataset: Dataset, rows: RowTable) -> KeptTexts:
    """Return the texts of a dataset, each once, and the place of each row's."""
    used = np.unique(np.concatenate([probe.mentions for probe in dataset.probes]))
    found = [texts.mentions[m] for m in used]
    return KeptTexts(
        dataset_fingerprint(texts, dataset),
        [Text(m.text, m.start, m.end, m.person) for m in found],
        {p.name: np.searchsorted(used, np.repeat(p.mentions, rows.count(p.mentions))) for p in dataset.probes},
    )
