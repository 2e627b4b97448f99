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

_REQUEST_FIELDS = {"model_name": "model", "sae": "saes", "dataset_split": "split", "dataset_columns": "columns"}
"""Name in `_run.config` -> field of the request, if the two have different names."""
_SETTINGS_OF_ENTRY = {
    "model": ("model_name", "revision", "trust_remote_code"),
    "sae": ("sae", "hookpoint"),
    "data": ("dataset_file", "dataset_split", "dataset_columns", "data_dir", "shuffle_select_n", "seed"),
    "calibration": ("dataset_file", "dataset_split", "dataset_columns", "data_dir", "seed"),
    "bos": ("bos",),
    "counts_bos": ("bos",),
    "dtype": ("dtype",),
    "hookpoint": ("hookpoint",),
}
"""Entry of `_run.key` -> the settings that determine it."""


def differences(stored: Mapping[str, Json], current: Mapping[str, Json]) -> list[str]:
    """Return the differences in `key` and `config` of two runs; names of request fields are in backticks."""
    old, new = stored["key"], current["key"]
    names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    return list(dict.fromkeys(line for name in names for line in _lines(name, stored, current)))


def _lines(name: str, stored: Mapping[str, Json], current: Mapping[str, Json]) -> Iterator[str]:
    old, new = stored["config"], current["config"]
    changed_settings = [
        part for part in _SETTINGS_OF_ENTRY.get(name, ()) if part in old and part in new and old[part] != new[part]
    ]
    for part in changed_settings:
        yield f"`{_REQUEST_FIELDS.get(part, part)}` {shown(part, old[part])} there, {shown(part, new[part])} now"
    if not changed_settings:
        yield _changed(name, stored, current)


def _changed(name: str, stored: Mapping[str, Json], current: Mapping[str, Json]) -> str:
    """Describe a difference that no setting explains."""
    old, new = stored["key"].get(name), current["key"].get(name)
    config = current["config"]
    if name == "model":
        return f"the files of the model {config.get('model_name')} have changed since"
    if name == "sae":
        return f"weights or config of the SAE {config.get('baseline_of_sae') or config.get('sae')} have changed since"
    if name == "data":
        file = config.get("dataset_file")
        return f"the rows of {file or 'the task'} have changed since: texts, labels, groups or spans"
    if name == "calibration":
        return "the texts that the baselines are fitted to have changed since"
    if name == "bos":
        return f"texts {_begin(old)} there, {_begin(new)} now"
    if name == "counts_bos":
        return "only one of the two counts BOS in the whole-text figures"
    known = name in {field.name for field, *_ in setting_fields()}
    return f"{f'`{name}`' if known else name} {shown(name, old)} there, {shown(name, new)} now"


def _begin(bos: Any) -> str:
    return "begin with BOS" if bos else "do not begin with BOS"


def shown(name: str, value: Any) -> str:
    """Return a value in the syntax of its flag; for None, the word in the help for an absent flag."""
    if value is None or value in ([], ()):
        return next(
            (rule.if_none for field, _, rule in setting_fields() if field.name == name and rule.if_none), "none"
        )
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ",".join("=".join(map(str, part)) if isinstance(part, list | tuple) else str(part) for part in value)
    return str(value)
