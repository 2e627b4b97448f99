"""Map field names to command-line flags."""

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
"""Fields whose flags have another name; every other flag is called as its field."""


def flag_of(field: str) -> str:
    """The flag that sets a field."""
    return f"--{OTHER_NAMES.get(field, field)}"


def with_flags(text: str) -> str:
    """A message of the library with flags in place of the fields that it names."""
    return FIELD.sub(lambda found: flag_of(found.group(1)), text)
