"""Hash of a dataset's questions, used to match results with their rows."""

from __future__ import annotations

import hashlib
import json

from delta_selectivity.tasks.types import Dataset, ProbeTexts


def dataset_fingerprint(texts: ProbeTexts, dataset: Dataset) -> str:
    """Return the SHA-256 (64 hex digits) of texts, spans, people and labels of every probe of `dataset`, in order.

    It depends on nothing else in `texts`: people enter by key, because ids change with the other loaded datasets.
    """
    digest = hashlib.sha256()
    for probe in dataset.probes:
        digest.update(json.dumps([probe.name, len(probe.labels)]).encode())
        for position, label in zip(probe.mentions.tolist(), probe.labels.tolist(), strict=True):
            mention = texts.mentions[position]
            # JSON delimits the parts: two different rows never give the same bytes
            digest.update(json.dumps([*mention.identity, mention.person, label]).encode())
    return digest.hexdigest()
