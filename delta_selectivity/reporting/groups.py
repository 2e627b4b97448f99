"""Which result files are one SAE's, and what keeps two SAEs from being compared.

Files of one SAE share everything that changes a number: they are averaged. Files that differ in the model's or the
SAE's weights, in the rows or in any setting are SAEs of their own, named by what differs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from delta_selectivity.records import result_file, sae_level
from delta_selectivity.records.differences import shown
from delta_selectivity.records.result_file import Json
from delta_selectivity.system.terminal import one_line

log = logging.getLogger(__name__)

File = tuple[Path, Json]  # where it lies, and what `result_file.read` found there

HASHES = ("model", "sae", "data", "calibration")
"""Entries of `_run.key` that say nothing to a reader."""
OF_THE_SAE = ("sae", "hookpoint", "counts_bos", "baseline", "calibration")
"""Entries in which two SAEs that are compared may differ, and those that change no paired difference:"""
UNPAIRED = ("views", "epsilon", "whole_tokens", "downstream")


def dataset_of(file: File) -> str:
    """The dataset as the file's name has it: without the model."""
    model = result_file.model_slug(str(file[1]["_run"]["config"].get("model_name", "")))
    return file[0].stem.removeprefix(f"{model}_")


def settings_of(file: File) -> Json:
    """Everything that changes a number, but for what the rows hold."""
    run = file[1]["_run"]
    found = {name: value for name, value in run["key"].items() if name not in ("schema", "data")}
    return {**found, "shuffle_select_n": run["config"].get("shuffle_select_n")}


def model_name(files: Sequence[File]) -> str:
    """What to call the model of files that share it: a hub id rather than a path, the shortest name of several."""
    names = {str(file[1]["_run"]["config"].get("model_name", "")) for file in files}
    return min(names, key=lambda name: (PurePath(name).is_absolute(), len(name), name))


def model_names(files: Sequence[File]) -> dict[Any, str]:
    """By the hash of its weights, what to call each model; two of one name are numbered."""
    by_hash: dict[Any, list[File]] = {}
    for file in files:
        by_hash.setdefault(str(file[1]["_run"]["key"].get("model")), []).append(file)
    names = {digest: model_name(own) for digest, own in by_hash.items()}
    n_of = Counter(names.values())
    seen: Counter[str] = Counter()
    for digest, name in names.items():
        seen[name] += 1
        if n_of[name] > 1:
            names[digest] = f"{name} [weights {seen[name]}]"
    return names


def without_repeats(files: Sequence[File]) -> list[File]:
    """The files without layers that an earlier one holds of the same measurement; a warning says which were left out.

    One is the same if model, SAE, rows and settings are, whatever they were called: a model by its hub id and by path.
    """
    seen: dict[str, dict[str, Path]] = {}
    kept = []
    for path, found in files:
        run = found["_run"]
        same = seen.setdefault(repr((run["config"]["sae"], dataset_of((path, found)), sorted(run["key"].items()))), {})
        again = {name: same[name] for name in found if name in same}
        same |= {name: path for name in found if name != "_run" and name not in same}
        if again:
            log.warning(one_line(f"{path} repeats what {next(iter(again.values()))} holds: counted once"))
        rest = {name: value for name, value in found.items() if name not in again}
        if len(rest) > 1 or not again:
            kept.append((path, rest))
    return kept


@dataclass
class _Group:
    """Files that may be averaged."""

    settings: Json
    data: dict[str, Any] = field(default_factory=dict)  # dataset -> hash of its rows
    files: list[File] = field(default_factory=list)

    def takes(self, file: File) -> bool:
        data = file[1]["_run"]["key"].get("data")
        return self.settings == settings_of(file) and self.data.get(dataset_of(file), data) == data

    def add(self, file: File) -> None:
        self.data[dataset_of(file)] = file[1]["_run"]["key"].get("data")
        self.files.append(file)


def split(by_name: Mapping[str, Sequence[File]]) -> dict[str, list[File]]:
    """The files of each SAE; those of one name that differ in more than the dataset are SAEs of longer names."""
    models = model_names([file for files in by_name.values() for file in files])
    found: dict[str, list[File]] = {}
    for name, files in by_name.items():
        groups: list[_Group] = []
        for file in files:
            group = next((group for group in groups if group.takes(file)), None)
            if group is None:
                group = _Group(settings_of(file))
                groups.append(group)
            group.add(file)
        for suffix, group in zip(_suffixes(groups, models), groups, strict=True):
            found[f"{name} ({suffix})" if suffix else name] = group.files
    return found


def _suffixes(groups: Sequence[_Group], models: Mapping[Any, str]) -> list[str]:
    """What sets each group apart from the others; empty if there are no others."""
    if len(groups) == 1:
        return [""]
    names = dict.fromkeys(name for group in groups for name in group.settings)
    differ = [name for name in names if any(g.settings.get(name) != groups[0].settings.get(name) for g in groups)]
    told = [", ".join(_told(name, group.settings.get(name), models) for name in differ) for group in groups]
    for more in ([group.files[0][0].parent.name for group in groups], [str(i + 1) for i in range(len(groups))]):
        seen = Counter(told)
        told = [
            ", ".join(filter(None, (text, f"in {own}"))) if seen[text] > 1 else text
            for text, own in zip(told, more, strict=True)
        ]
    return [text.strip(", ") for text in told]


def _told(name: str, value: Any, models: Mapping[Any, str]) -> str:
    if name == "model":
        return f"model {models.get(value, value)}"
    return "" if name in HASHES else f"{name} {shown(name, value)}"


def obstacle(one: Sequence[File], other: Sequence[File]) -> str | None:
    """Why the two cannot be compared row by row: each setting that differs with both values; None if they can."""
    models = model_names([*one, *other])
    a, b = (
        {name: value for name, value in settings_of(files[0]).items() if name not in (*OF_THE_SAE, *UNPAIRED)}
        for files in (one, other)
    )
    differ = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    if differ:
        return "; ".join(_both(name, a.get(name), b.get(name), models) for name in differ)
    data = [{dataset_of(file): file[1]["_run"]["key"].get("data") for file in files} for files in (one, other)]
    common = data[0].keys() & data[1].keys()
    if not common:
        return f"no dataset in common ({', '.join(sorted(data[0]))}; {', '.join(sorted(data[1]))})"
    if all(data[0][name] != data[1][name] for name in common):
        return "; ".join(filter(None, (_rows_differ(one[0], other[0]), f"other rows of {', '.join(sorted(common))}")))
    return None


def _both(name: str, one: Any, other: Any, models: Mapping[Any, str]) -> str:
    if name == "model":
        one, other = models[str(one)], models[str(other)]
    return f"{name} {shown(name, one)} and {shown(name, other)}"


def _rows_differ(one: File, other: File) -> str:
    """The settings behind rows that are not the same."""
    a, b = (file[1]["_run"]["config"] for file in (one, other))
    names = ("dataset_file", "dataset_split", "dataset_columns", "data_dir")
    return "; ".join(
        f"{name} {shown(name, a.get(name))} and {shown(name, b.get(name))}"
        for name in names
        if a.get(name) != b.get(name)
    )


def stored_cells(files: Sequence[File]) -> dict[sae_level.Place, Any] | None:
    """The stored scores of an SAE's files, by dataset whatever the model was called; None if some are gone."""
    found: dict[sae_level.Place, Any] = {}
    for path, content in files:
        layers = sorted(int(name.removeprefix("layer_")) for name in content if name != "_run")
        cells = sae_level.read_cells([(path, content["_run"]["key"], layers)])
        if cells is None:
            return None
        found |= {(dataset_of((path, content)), layer, probe): scores for (_, layer, probe), scores in cells.items()}
    return found
