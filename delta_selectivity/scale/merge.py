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

    Raises `RequestError` if the unit measured something else, because an SAE, the model or the data changed on disk
    since the request was checked.
    """
    names = {file.path.name for file in files.values()}
    for path in sorted(unit_folder.glob("**/*.json")):
        if path.name not in names:
            continue  # not a result file of this request
        final = _result_file(path, files)
        found = RecordFile.open(path, final.key, final.run, overwrite=False)
        new = {layer: record for layer, record in found.layers.items() if layer not in final.layers}
        if not new:
            continue
        layers = {**without_q_values(final.layers), **new}
        prune(final.path, layers)
        for layer in new:
            _move(path_of(path, layer), path_of(final.path, layer))
        if texts.path_of(path).is_file():
            texts.keep(final.path, texts.path_of(path).read_bytes())
        final.warnings += [line for line in found.warnings if line not in final.warnings]
        final.seconds = _sums(final.seconds, found.seconds)
        final.resources = _maxima(final.resources, found.resources)
        final.complete = False
        final.write(layers)


def _result_file(path: Path, files: Files) -> RecordFile:
    """Return the file into which a unit's file is merged: the one for the same SAE or baseline and dataset."""
    sae = read(path)["_run"]["config"]["sae"]
    (final,) = (file for file in files.values() if file.path.name == path.name and file.run["config"]["sae"] == sae)
    return final


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
