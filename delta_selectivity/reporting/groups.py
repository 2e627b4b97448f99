"""Group result files by SAE, and find out whether two SAEs can be compared.

Files of one SAE share everything that affects the numbers, and are averaged. Files that differ in the model's or the
SAE's weights, in the rows or in any setting count as different SAEs, named by the difference.
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

File = tuple[Path, Json]  # path, and content as returned by `result_file.read`

HASHES = ("model", "sae", "data", "calibration")
"""Hashes in `_run.key`, which are not meaningful to a reader."""
OF_THE_SAE = ("sae", "hookpoint", "counts_bos", "baseline", "calibration")
"""Entries that describe the SAE itself, so two compared SAEs may differ in them."""
UNPAIRED = ("views", "epsilon", "whole_tokens", "downstream")
"""Entries that do not affect a paired difference, so two compared SAEs may differ in them."""


def dataset_of(file: File) -> str:
    """Return the dataset as in the file's name, without the model."""
    model = result_file.model_slug(str(file[1]["_run"]["config"].get("model_name", "")))
    return file[0].stem.removeprefix(f"{model}_")


def settings_of(file: File) -> Json:
    """Return everything that affects the numbers, except for the hash of the rows."""
    run = file[1]["_run"]
    settings = {name: value for name, value in run["key"].items() if name not in ("schema", "data")}
    return {**settings, "shuffle_select_n": run["config"].get("shuffle_select_n")}


def model_name(files: Sequence[File]) -> str:
    """Return the display name of the model of these files: preferably a hub id, and the shortest of several."""
    names = {str(file[1]["_run"]["config"].get("model_name", "")) for file in files}
    return min(names, key=lambda name: (PurePath(name).is_absolute(), len(name), name))


def model_names(files: Sequence[File]) -> dict[Any, str]:
    """Return the display name of each model by the hash of its weights; equal names are numbered."""
    by_hash: dict[Any, list[File]] = {}
    for file in files:
        by_hash.setdefault(str(file[1]["_run"]["key"].get("model")), []).append(file)
    names = {digest: model_name(files_of_model) for digest, files_of_model in by_hash.items()}
    n_of = Counter(names.values())
    seen: Counter[str] = Counter()
    for digest, name in names.items():
        seen[name] += 1
        if n_of[name] > 1:
            names[digest] = f"{name} [weights {seen[name]}]"
    return names


def without_repeats(files: Sequence[File]) -> list[File]:
    """Drop layers that an earlier file of the same measurement also has, with a warning.

    Two measurements are the same if their model, SAE, rows and settings are. The model may have different names, such
    as a hub id and a path.
    """
    seen: dict[str, dict[str, Path]] = {}
    kept = []
    for path, content in files:
        run = content["_run"]
        same = seen.setdefault(
            repr((run["config"]["sae"], dataset_of((path, content)), sorted(run["key"].items()))), {}
        )
        repeated = {name: same[name] for name in content if name in same}
        same |= {name: path for name in content if name != "_run" and name not in same}
        if repeated:
            log.warning(one_line(f"{path} has layers that {next(iter(repeated.values()))} also has: counted once"))
        rest = {name: value for name, value in content.items() if name not in repeated}
        if len(rest) > 1 or not repeated:
            kept.append((path, rest))
    return kept


@dataclass
class _Group:
    """Files that may be averaged."""

    settings: Json
    data: dict[str, Any] = field(default_factory=dict)  # dataset -> hash of its rows
    files: list[File] = field(default_factory=list)

    def accepts(self, file: File) -> bool:
        data = file[1]["_run"]["key"].get("data")
        return self.settings == settings_of(file) and self.data.get(dataset_of(file), data) == data

    def add(self, file: File) -> None:
        self.data[dataset_of(file)] = file[1]["_run"]["key"].get("data")
        self.files.append(file)


def split(by_name: Mapping[str, Sequence[File]]) -> dict[str, list[File]]:
    """Return the files of each SAE; files of one name that differ in more than the dataset get longer names."""
    models = model_names([file for files in by_name.values() for file in files])
    files_by_sae: dict[str, list[File]] = {}
    for name, files in by_name.items():
        groups: list[_Group] = []
        for file in files:
            group = next((group for group in groups if group.accepts(file)), None)
            if group is None:
                group = _Group(settings_of(file))
                groups.append(group)
            group.add(file)
        for suffix, group in zip(_suffixes(groups, models), groups, strict=True):
            files_by_sae[f"{name} ({suffix})" if suffix else name] = group.files
    return files_by_sae


def _suffixes(groups: Sequence[_Group], models: Mapping[Any, str]) -> list[str]:
    """Return what distinguishes each group from the others; empty for a single group."""
    if len(groups) == 1:
        return [""]
    names = dict.fromkeys(name for group in groups for name in group.settings)
    differ = [name for name in names if any(g.settings.get(name) != groups[0].settings.get(name) for g in groups)]
    suffixes = [", ".join(_setting_text(name, group.settings.get(name), models) for name in differ) for group in groups]
    for more in ([group.files[0][0].parent.name for group in groups], [str(i + 1) for i in range(len(groups))]):
        seen = Counter(suffixes)
        suffixes = [
            ", ".join(filter(None, (text, f"in {word}"))) if seen[text] > 1 else text
            for text, word in zip(suffixes, more, strict=True)
        ]
    return [text.strip(", ") for text in suffixes]


def _setting_text(name: str, value: Any, models: Mapping[Any, str]) -> str:
    if name == "model":
        return f"model {models.get(value, value)}"
    return "" if name in HASHES else f"{name} {shown(name, value)}"


def why_incomparable(one: Sequence[File], other: Sequence[File]) -> str | None:
    """Return why two SAEs cannot be compared row by row: the settings that differ; None if they can be compared."""
    models = model_names([*one, *other])
    a, b = (
        {name: value for name, value in settings_of(files[0]).items() if name not in (*OF_THE_SAE, *UNPAIRED)}
        for files in (one, other)
    )
    differ = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    if differ:
        return "; ".join(_setting_of_both(name, a.get(name), b.get(name), models) for name in differ)
    data = [{dataset_of(file): file[1]["_run"]["key"].get("data") for file in files} for files in (one, other)]
    common = data[0].keys() & data[1].keys()
    if not common:
        return f"no dataset in common ({', '.join(sorted(data[0]))}; {', '.join(sorted(data[1]))})"
    if all(data[0][name] != data[1][name] for name in common):
        rows = f"different rows of {', '.join(sorted(common))}"
        return "; ".join(filter(None, (_rows_differ(one[0], other[0]), rows)))
    return None


def _setting_of_both(name: str, one: Any, other: Any, models: Mapping[Any, str]) -> str:
    if name == "model":
        one, other = models[str(one)], models[str(other)]
    return f"{name} {shown(name, one)} and {shown(name, other)}"


def _rows_differ(one: File, other: File) -> str:
    """Return the settings that caused different rows."""
    a, b = (file[1]["_run"]["config"] for file in (one, other))
    names = ("dataset_file", "dataset_split", "dataset_columns", "data_dir")
    return "; ".join(
        f"{name} {shown(name, a.get(name))} and {shown(name, b.get(name))}"
        for name in names
        if a.get(name) != b.get(name)
    )


def stored_cells(files: Sequence[File]) -> dict[sae_level.Place, Any] | None:
    """Return the stored scores of an SAE's files, by dataset without the model's name; None if some are missing."""
    all_cells: dict[sae_level.Place, Any] = {}
    for path, content in files:
        layers = sorted(int(name.removeprefix("layer_")) for name in content if name != "_run")
        cells = sae_level.read_cells([(path, content["_run"]["key"], layers)])
        if cells is None:
            return None
        all_cells |= {
            (dataset_of((path, content)), layer, probe): scores for (_, layer, probe), scores in cells.items()
        }
    return all_cells
