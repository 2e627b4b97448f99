"""Mapping from field names to command-line flags."""

from __future__ import annotations

from delta_selectivity.errors import FIELD

OTHER_NAMES = {
    "model": "model_name",
    "saes": "sae_name",
    "tasks": "datasets",
    "output": "output_directory",
    "cache": "cache_dir",
    "split": "dataset_split",
    "columns": "dataset_columns",
    "page": "output",
}
"""Fields whose flags have a different name; all other flags are named after their field."""


def flag_of(field: str) -> str:
    """Return the flag that sets a field."""
    return f"--{OTHER_NAMES.get(field, field)}"


def with_flags(text: str) -> str:
    """Replace the field names in a message with their flags."""
    return FIELD.sub(lambda match: flag_of(match.group(1)), text)
