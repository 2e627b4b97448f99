"""Hash of a dataset's questions, by which results are matched with their rows."""

from __future__ import annotations

import hashlib
import json

from delta_selectivity.tasks.types import Dataset, ProbeTexts


def dataset_fingerprint(texts: ProbeTexts, dataset: Dataset) -> str:
    """SHA-256 (64 hex digits) over texts, spans, people and labels of every probe of `dataset`, in order.

    Depends on nothing else in `texts`: people enter by key, since ids shift with the other datasets loaded.
    """
    digest = hashlib.sha256()
    for probe in dataset.probes:
        digest.update(json.dumps([probe.name, len(probe.labels)]).encode())
        for position, label in zip(probe.mentions.tolist(), probe.labels.tolist(), strict=True):
            mention = texts.mentions[position]
            # JSON keeps the parts apart: no two different rows give the same bytes
            digest.update(json.dumps([*mention.identity, mention.person, label]).encode())
    return digest.hexdigest()
