"""Figures that need all results of an SAE: q values, its mean delta, its difference from another SAE.

    with_q_values(layers_by_dataset)          # Benjamini-Hochberg over all results of the SAE
    mean_delta(cells)                         # Estimate over layers and probes: value, 95 % interval, p
    difference(cells_a, cells_b)              # paired: the same rows, folds and people; both also for transfer_r2
    settle(files)                             # writes all of it into the result files of a finished run

The cells of an SAE share their people, so the interval treats a person's rows in all cells as one cluster.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from delta_selectivity.errors import RequestError
from delta_selectivity.probing.probe_statistics import ProbeScores, correct, r2_parts
from delta_selectivity.probing.uncertainty import Cell, Estimate, benjamini_hochberg, estimate_mean
from delta_selectivity.records import scores
from delta_selectivity.records.result_file import Json, RecordFile
from delta_selectivity.records.task_level import Place, TaskOfFile, levels, task_of

SaeId = int  # index among the datasets of a run


def read_cells(files: Iterable[tuple[Path, Mapping[str, Any], Iterable[int]]]) -> dict[Place, ProbeScores] | None:
    """Read the stored scores of result files, each given with its key and layers.

    Returns None if some scores are missing or belong to another run.
    """
    cells: dict[Place, ProbeScores] = {}
    for path, key, layers in files:
        digest = scores.key_digest(key)
        for layer in layers:
            try:
                stored = scores.load(scores.path_of(path, layer))
            except RequestError:
                return None
            if stored.key != digest:
                return None
            cells |= {(path.name, layer, probe): scores_of_probe for probe, scores_of_probe in stored.probes.items()}
    return cells


def mean_delta(cells: Mapping[Place, ProbeScores]) -> Estimate | None:
    """Return sae_sel - model_sel, averaged over the cells; None if there are none."""
    return _mean(list(_deltas(cells).values()))


def mean_transfer_r2(cells: Mapping[Place, ProbeScores]) -> Estimate | None:
    """Return transfer_r2 averaged over the cells; None if no cell has it."""
    return _mean(list(_parts_of_r2(cells).values()))


def _deltas(cells: Mapping[Place, ProbeScores]) -> dict[Place, Cell]:
    return {place: _cell(p, correct(p, "sae") - correct(p, "model")) for place, p in cells.items()}


def _parts_of_r2(cells: Mapping[Place, ProbeScores]) -> dict[Place, Cell]:
    return {
        place: _cell(p, r2_parts(p, "transfer"), level_varies=True)
        for place, p in cells.items()
        if "transfer" in p.views
    }


def difference(a: Mapping[Place, ProbeScores], b: Mapping[Place, ProbeScores]) -> Estimate | None:
    """Return the paired difference in sae_sel, a - b, averaged over cells on the same rows and folds; None if none."""
    return _mean(list(_differences(a, b).values()))


def difference_in_transfer_r2(a: Mapping[Place, ProbeScores], b: Mapping[Place, ProbeScores]) -> Estimate | None:
    """Return the paired difference in transfer_r2, a - b: the best score to rank close SAEs (docs/reliability.md)."""
    return _mean(list(_differences_of_r2(a, b).values()))


def _differences(a: Mapping[Place, ProbeScores], b: Mapping[Place, ProbeScores]) -> dict[Place, Cell]:
    return {
        place: _cell(one, correct(one, "sae") - correct(other, "sae")) for place, (one, other) in _shared(a, b).items()
    }


def _differences_of_r2(a: Mapping[Place, ProbeScores], b: Mapping[Place, ProbeScores]) -> dict[Place, Cell]:
    return {
        place: _cell(one, r2_parts(one, "transfer") - r2_parts(other, "transfer"), level_varies=True)
        for place, (one, other) in _shared(a, b).items()
        if "transfer" in one.views and "transfer" in other.views
    }


def _shared(
    a: Mapping[Place, ProbeScores], b: Mapping[Place, ProbeScores]
) -> dict[Place, tuple[ProbeScores, ProbeScores]]:
    return {place: (a[place], b[place]) for place in a if place in b and _same_rows(a[place], b[place])}


def _mean(cells: list[Cell]) -> Estimate | None:
    return estimate_mean(cells) if cells else None


def _cell(probe: ProbeScores, change: np.ndarray, level_varies: bool = False) -> Cell:
    return Cell(change, probe.labels, probe.persons, probe.weights, probe.n_folds, level_varies)


def _same_rows(a: ProbeScores, b: ProbeScores) -> bool:
    names = ("labels", "persons", "weights", "folds")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


def with_q_values(family: Mapping[int, Mapping[int, Json]]) -> dict[int, dict[int, Json]]:
    """Return dataset -> layer -> record with `q_value` and `transfer_q_value` set.

    Uses Benjamini-Hochberg over all results of one SAE: all datasets of the run x layers x probes.
    """
    result = {index: {layer: dict(record) for layer, record in layers.items()} for index, layers in family.items()}
    cells = [
        (record, name)
        for index in sorted(result)
        for _, record in sorted(result[index].items())
        for name, cell in record.items()
        if isinstance(cell, dict) and "p_value" in cell
    ]
    for prefix in ("", "transfer_"):
        q_values = benjamini_hochberg([record[name][f"{prefix}p_value"] for record, name in cells])
        for (record, name), q_value in zip(cells, q_values, strict=True):
            record[name] = {**record[name], f"{prefix}q_value": q_value}
    return result


def without_q_values(layers: Mapping[int, Json]) -> dict[int, Json]:
    """Return the layers' records without q values, which need all results of an SAE."""

    def strip(value: Any) -> Any:
        return {k: v for k, v in value.items() if not k.endswith("q_value")} if isinstance(value, dict) else value

    return {layer: {name: strip(value) for name, value in record.items()} for layer, record in layers.items()}


def settle(files: Mapping[tuple[SaeId, int], RecordFile]) -> None:
    """Write the figures that depend on all files of an SAE, and mark the files complete.

    These are the q values and, in `_run.sae_level`, the SAE's mean delta and its differences from the other SAEs of the
    run. Baselines are compared with SAEs, but SAEs are not compared with baselines. Complete files stay unchanged.
    """
    by_sae: dict[SaeId, dict[int, RecordFile]] = {}
    for (sae_id, index), file in sorted(files.items()):
        by_sae.setdefault(sae_id, {})[index] = file
    saes = {
        sae_id: files_of_sae
        for sae_id, files_of_sae in by_sae.items()
        if not any(file.is_baseline for file in files_of_sae.values())
    }
    cells = _StoredCells(by_sae)
    for sae_id, files_of_sae in by_sae.items():
        others = {next(iter(files_of.values())).run["config"]["sae"]: i for i, files_of in saes.items() if i != sae_id}
        family = sorted(file.path.name for file in files_of_sae.values())
        with_q = with_q_values({index: file.layers for index, file in files_of_sae.items()})
        todo = [
            i for i, file in files_of_sae.items() if file.layers != with_q[i] or not _is_final(file, family, others)
        ]
        if not todo:
            continue
        tasks = {file.path.name: task_of(file.run, file.path.name) for file in files_of_sae.values()}
        level = _sae_level(cells, sae_id, others, tasks)
        for index in todo:
            file = files_of_sae[index]
            file.q_family, file.sae_level, file.complete = family, level, True
            file.write(with_q[index])


def _is_final(file: RecordFile, family: list[str], others: Mapping[str, SaeId]) -> bool:
    return file.complete and file.q_family == family and file.sae_level["compared"].keys() == others.keys()


class _StoredCells:
    """Out-of-fold scores on disk by SAE; at most two SAEs are in memory at a time."""

    def __init__(self, files: Mapping[SaeId, Mapping[int, RecordFile]]) -> None:
        self._files = files
        self.of = functools.lru_cache(maxsize=2)(self._read)

    def _read(self, sae_id: SaeId) -> dict[Place, ProbeScores] | None:
        files_of_sae = self._files[sae_id].values()
        return read_cells((file.path, file.key, sorted(file.layers)) for file in files_of_sae)


def _sae_level(
    cells: _StoredCells, sae_id: SaeId, others: Mapping[str, SaeId], tasks: Mapping[str, TaskOfFile]
) -> Json:
    cells_of_sae = cells.of(sae_id)
    return {
        **summarise(cells_of_sae, tasks),
        "compared": {name: compare(cells_of_sae, cells.of(other), tasks) for name, other in others.items()},
    }


def summarise(cells: Mapping[Place, ProbeScores] | None, tasks: Mapping[str, TaskOfFile]) -> Json:
    """Return the means of an SAE's cells for `_run.sae_level`; each is None if there are no cells.

    Args:
        cells: The SAE's stored scores by place.
        tasks: The task of each file, by the first part of a place. If there are several, the entry `tasks` has the
            means over them, treated as a random sample.
    """
    over = levels({"delta_sel": _deltas(cells), "transfer_r2": _parts_of_r2(cells)}, tasks) if cells else None
    return {
        **({} if over is None else {"tasks": over}),
        **_with_test("delta_sel", mean_delta(cells) if cells else None),
        **_with_interval("transfer_r2", mean_transfer_r2(cells) if cells else None),
        "n_cells": len(cells) if cells else None,
    }


def compare(
    cells: Mapping[Place, ProbeScores] | None,
    other: Mapping[Place, ProbeScores] | None,
    tasks: Mapping[str, TaskOfFile],
) -> Json:
    """Return the paired difference of two SAEs for `_run.sae_level`; each number is None if they share no cells.

    Args:
        cells: The first SAE's stored scores by place.
        other: The second SAE's.
        tasks: As for `summarise`.
    """
    both = (cells, other) if cells and other else None
    scores = {"delta_sel": _differences(*both), "transfer_r2": _differences_of_r2(*both)} if both else {}
    over = levels(scores, tasks, by_family=False)
    return {
        **({} if over is None else {"tasks": over}),
        **_with_test("delta_sel", difference(*both) if both else None),
        **_with_test("transfer_r2", difference_in_transfer_r2(*both) if both else None),
    }


def _with_interval(name: str, estimate: Estimate | None) -> Json:
    """Return an estimate and the bounds of its interval by key; each is None if there is no estimate."""
    if estimate is None:
        return dict.fromkeys((name, f"{name}_ci_low", f"{name}_ci_high"))
    return {name: estimate.value, f"{name}_ci_low": estimate.low, f"{name}_ci_high": estimate.high}


def _with_test(name: str, estimate: Estimate | None) -> Json:
    """Return a difference by key, with its interval and the test that it is 0."""
    test = {f"{name}_p_value": estimate and estimate.p_value, f"{name}_detectable": estimate and estimate.detectable}
    return {**_with_interval(name, estimate), **test}
