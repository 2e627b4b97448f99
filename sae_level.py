"""One figure for an SAE: its mean delta over layers and probes, and its difference from another SAE's.

    read_cells(files)                     # the stored scores beside result files
    mean_delta(cells)                     # Estimate: value, 95 % interval, p
    difference(cells_a, cells_b)          # paired: the same rows, folds and people

The cells of an SAE share their people, so its interval treats a person's rows in all of them as one draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import scores
from errors import RequestError
from probe_statistics import ProbeScores, correct
from uncertainty import Cell, Estimate, estimate_mean

Place = tuple[str, int, str]  # result file's name, layer, probe


def read_cells(files: Iterable[tuple[Path, Mapping[str, Any]]]) -> dict[Place, ProbeScores] | None:
    """The stored scores of everything measured in result files; None if those of a layer are gone or not its own."""
    cells: dict[Place, ProbeScores] = {}
    for path, results in files:
        key = scores.key_digest(results["_run"]["key"])
        for name in (name for name in results if name.startswith("layer_")):
            try:
                stored = scores.load(scores.path_of(path, int(name.removeprefix("layer_"))))
            except RequestError:
                return None
            if stored.key != key:
                return None
            cells |= {(path.name, stored.layer, probe): found for probe, found in stored.probes.items()}
    return cells


def mean_delta(cells: Mapping[Place, ProbeScores]) -> Estimate | None:
    """sae_sel - model_sel, averaged over the cells; None if there are none, or their repeats differ."""
    return _mean([_cell(found, correct(found, "sae") - correct(found, "model")) for found in cells.values()])


def difference(a: Mapping[Place, ProbeScores], b: Mapping[Place, ProbeScores]) -> Estimate | None:
    """a's sae_sel - b's, averaged over the cells that both have on the same rows and folds; None if none."""
    shared = [(a[place], b[place]) for place in a if place in b and _same_rows(a[place], b[place])]
    return _mean([_cell(one, correct(one, "sae") - correct(other, "sae")) for one, other in shared])


def _mean(cells: list[Cell]) -> Estimate | None:
    return estimate_mean(cells) if cells and len({len(cell.change) for cell in cells}) == 1 else None


def _cell(found: ProbeScores, change: np.ndarray) -> Cell:
    return Cell(change, found.labels, found.persons, found.weights)


def _same_rows(a: ProbeScores, b: ProbeScores) -> bool:
    names = ("labels", "persons", "weights", "folds")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
