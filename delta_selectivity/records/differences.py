"""Describe in words why a result file cannot be continued.

>>> there = {"key": {"seed": 0}, "config": {}}
>>> differences(there, {"key": {"seed": 1}, "config": {}})
['`seed` 0 there, 1 now']

A hash in the key is described by the settings it depends on. If these all agree, the hashed content has changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from delta_selectivity.settings import fields as setting_fields

Json = dict[str, Any]

_FIELDS = {"model_name": "model", "sae": "saes", "dataset_split": "split", "dataset_columns": "columns"}
"""Names in `_run.config` -> fields of the request, where they differ."""
_BEHIND = {
    "model": ("model_name", "revision", "trust_remote_code"),
    "sae": ("sae", "hookpoint"),
    "data": ("dataset_file", "dataset_split", "dataset_columns", "data_dir", "shuffle_select_n", "seed"),
    "calibration": ("dataset_file", "dataset_split", "dataset_columns", "data_dir", "seed"),
    "bos": ("bos",),
    "counts_bos": ("bos",),
    "dtype": ("dtype",),
    "hookpoint": ("hookpoint",),
}
"""Entries of `_run.key` -> the settings that they follow from."""


def differences(there: Mapping[str, Json], now: Mapping[str, Json]) -> list[str]:
    """Return the differences in `key` and `config` of two runs; names of request fields are in backticks."""
    old, new = there["key"], now["key"]
    names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    return list(dict.fromkeys(line for name in names for line in _lines(name, there, now)))


def _lines(name: str, there: Mapping[str, Json], now: Mapping[str, Json]) -> Iterator[str]:
    old, new = there["config"], now["config"]
    behind = [part for part in _BEHIND.get(name, ()) if part in old and part in new and old[part] != new[part]]
    for part in behind:
        yield f"`{_FIELDS.get(part, part)}` {shown(part, old[part])} there, {shown(part, new[part])} now"
    if not behind:
        yield _changed(name, there, now)


def _changed(name: str, there: Mapping[str, Json], now: Mapping[str, Json]) -> str:
    """Describe a difference that no setting explains."""
    old, new = there["key"].get(name), now["key"].get(name)
    config = now["config"]
    if name == "model":
        return f"the files of the model {config.get('model_name')} have changed since"
    if name == "sae":
        return f"weights or config of the SAE {config.get('baseline_of_sae') or config.get('sae')} have changed since"
    if name == "data":
        file = config.get("dataset_file")
        return f"the rows of {file or 'the task'} have changed since: texts, labels, groups or spans"
    if name == "calibration":
        return "the texts that baselines are fitted to have changed since"
    if name == "bos":
        return f"texts {_begin(old)} there, {_begin(new)} now"
    if name == "counts_bos":
        return "BOS counts in the whole-text figures of one and not of the other"
    known = name in {field.name for field, *_ in setting_fields()}
    return f"{f'`{name}`' if known else name} {shown(name, old)} there, {shown(name, new)} now"


def _begin(bos: Any) -> str:
    return "begin with BOS" if bos else "do not begin with BOS"


def shown(name: str, value: Any) -> str:
    """Return a value in the syntax of its flag; None as the meaning of an absent flag."""
    if value is None or value in ([], ()):
        return next(
            (rule.if_none for field, _, rule in setting_fields() if field.name == name and rule.if_none), "none"
        )
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ",".join("=".join(map(str, part)) if isinstance(part, list | tuple) else str(part) for part in value)
    return str(value)
