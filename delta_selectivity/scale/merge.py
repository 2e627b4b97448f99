"""Merging of unit results into the result files of the request.

    merge(unit.folder, files)

As in `prober`, scores are written before the file that marks their layer as done, so merging can be interrupted
anywhere and repeated. Existing results are kept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from delta_selectivity.records import texts
from delta_selectivity.records.result_file import RecordFile, read
from delta_selectivity.records.sae_level import without_q_values
from delta_selectivity.records.scores import path_of, prune
from delta_selectivity.run.planning import Files
from delta_selectivity.system.whole_file import refuse_link


def merge(unit_folder: Path, files: Files) -> None:
    """Merge a unit's results into the request's files, which are open and locked.

    Raises `RequestError` if the key of a result differs, because an SAE, the model or the data changed on disk since
    the request was checked.
    """
    names = {file.path.name for file in files.values()}
    for path in sorted(unit_folder.glob("**/*.json")):
        if path.name not in names:
            continue  # not a result file of this request
        target = _result_file(path, files)
        found = RecordFile.open(path, target.key, target.run, overwrite=False)
        new = {layer: record for layer, record in found.layers.items() if layer not in target.layers}
        if not new:
            continue
        layers = {**without_q_values(target.layers), **new}
        prune(target.path, layers)
        for layer in new:
            _move(path_of(path, layer), path_of(target.path, layer))
        if texts.path_of(path).is_file():
            texts.keep(target.path, texts.path_of(path).read_bytes())
        target.warnings += [line for line in found.warnings if line not in target.warnings]
        target.seconds = _sums(target.seconds, found.seconds)
        target.resources = _maxima(target.resources, found.resources)
        target.complete = False
        target.write(layers)


def _result_file(path: Path, files: Files) -> RecordFile:
    """Return the file into which a unit's file is merged: the one for the same SAE or baseline and dataset."""
    sae = read(path)["_run"]["config"]["sae"]
    (target,) = (file for file in files.values() if file.path.name == path.name and file.run["config"]["sae"] == sae)
    return target


def _move(source: Path, target: Path) -> None:
    """Move a file; a file that an interrupted merge has already moved is not an error."""
    refuse_link(target.parent)
    if source.exists() or not target.exists():
        target.parent.mkdir(exist_ok=True)
        os.replace(source, target)  # noqa: PTH105


def _sums(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """Sum seconds per stage over units; the sum is work, not elapsed time."""
    return {name: round(a.get(name, 0.0) + b.get(name, 0.0), 3) for name in {**a, **b}}


def _maxima(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {name: max(a.get(name, 0.0), b.get(name, 0.0)) for name in {**a, **b}}
