"""Classes of the labels in a user's table: missing labels, equal spellings, and the positive class.

classes = read_classes(["Yes", "yes", "no"])
classes.class_of["Yes"]                      # 'Yes': the most frequent spelling; ties: the first in order
classes.values                               # ('no', 'Yes'): the last of two is the positive class
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from delta_selectivity.system.person_ids import number_key

_MISSING = {"", "nan", "na", "n/a", "#n/a", "<na>", "nat", "null"}  # common spellings of missing values
_TRUTH = {"0": "0", "1": "1", "false": "0", "true": "1"}


@dataclass(frozen=True)
class Classes:
    """The classes of one task."""

    values: tuple[str, ...]  # in order: two numbers by size, others alphabetically, ignoring case
    class_of: Mapping[str, str]  # label in the table -> its class

    @property
    def merged(self) -> list[tuple[str, ...]]:
        """Return the spellings that differ only in case or Unicode form: one tuple for each class with several."""
        spellings: dict[str, list[str]] = {}
        for label, value in sorted(self.class_of.items()):
            if number_key(label) is None:
                spellings.setdefault(value, []).append(label)
        return [tuple(found) for found in spellings.values() if len(found) > 1]

    @property
    def fractions(self) -> list[str]:
        """Return the non-integer classes if all classes are numbers."""
        return [value for value in self.values if "." in value] if _all_numbers(self.values) else []


def is_missing(label: Any) -> bool:
    """Return whether a cell has no label: None, NaN, empty, or a word such as `nan` or `NA`."""
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return True
    return str(label).strip().casefold() in _MISSING


def read_classes(labels: Iterable[str]) -> Classes:
    """Return the classes of labels. Equal numbers are merged, and words that differ only in case or Unicode form.

    The name of a class is its most frequent spelling. If all labels are 0, 1, true or false, they become 0 and 1.
    """
    counts = Counter(labels)
    key = {label: number_key(label) or unicodedata.normalize("NFKC", label).casefold() for label in counts}
    if set(key.values()) <= _TRUTH.keys():
        name = dict(_TRUTH)
    else:
        by_use = sorted(counts, key=lambda label: (-counts[label], label))
        name = {key[label]: number_key(label) or label for label in reversed(by_use)}
    of = {label: name[key[label]] for label in counts}
    values = set(of.values())
    if len(values) == 2 and _all_numbers(values):
        return Classes(tuple(sorted(values, key=Decimal)), of)
    return Classes(tuple(sorted(values, key=lambda value: (value.casefold(), value))), of)


def _all_numbers(values: Iterable[str]) -> bool:
    return all(number_key(value) is not None for value in values)
