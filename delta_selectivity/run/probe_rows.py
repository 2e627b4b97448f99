"""Measurement of a file of rows.

found = probe_rows(load(Path("rows.safetensors")), settings, "cpu")
found["my_sae"].records["gender"]["delta_sel"]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.probing.arrays import Targets, check_views, measure_rows
from delta_selectivity.probing.probes import check_backend, choose_backend
from delta_selectivity.probing.selectivity import as_record
from delta_selectivity.records.result_file import Json, describe_run
from delta_selectivity.records.rows_file import RowProbe, Rows
from delta_selectivity.records.sae_level import with_q_values
from delta_selectivity.run.cell_result import ONE_PARTITION, CellResult, warnings_of
from delta_selectivity.run.reconstruction import Reconstruction, ReconstructionSums
from delta_selectivity.settings import PROBING, Settings
from delta_selectivity.system.cores import sharing_cores

FIGURES = ("mse_pos", "fvu_pos", "cosine", "n_probed")
"""Figures that are defined for the reconstruction of rows alone."""


@dataclass(frozen=True)
class RowsResult:
    """The results of a file of rows."""

    saes: Mapping[str, CellResult]
    rows: Rows
    settings: Settings

    def warnings(self) -> list[str]:
        """Return warnings about the numbers, one line each."""
        saes = self.rows.about.get("saes", {})
        lines = [
            f"{name}{line}"
            for name, found in self.saes.items()
            for line in warnings_of(found, bool(isinstance(saes.get(name), dict) and saes[name].get("baseline")))
        ]
        return [*lines, ONE_PARTITION] if self.settings.repeats == 1 else lines

    def to_json(self) -> Json:
        """Return JSON values: SAE -> its figures and probe -> record; `_run` says how they were computed."""
        settings = {name: getattr(self.settings, name) for name in PROBING}
        about = {name: value for name, value in self.rows.about.items() if name not in ("settings", "datasets")}
        run = {**describe_run({**settings, "rows": about}), "warnings": self.warnings()}
        return {**{name: _record(found) for name, found in self.saes.items()}, "_run": run}


def settings_of(rows: Rows, **others: Any) -> Settings:
    """Return the settings stored in a file of rows, updated by `others`; missing ones have their defaults.

    Raises `RequestError` for values that `Settings` does not accept.
    """
    stored = rows.about.get("settings", {})
    return Settings(**{name: stored[name] for name in PROBING if name in stored} | others)


def probe_rows(rows: Rows, settings: Settings, device: str) -> RowsResult:
    """Measure every SAE of a file of rows with every probe.

    Args:
        rows: The result of `records.rows_file.load`.
        settings: Only the fields in `PROBING` have an effect.
        device: Where probes are fitted. On a CPU, each core fits one set of probes with one thread, as in a run.

    Raises:
        RequestError: Latent views are requested, a name is reserved, or the solver is not available.
        ArithmeticError: A reconstruction is too large for its error or its probes.
    """
    check_views(settings)
    check_backend(settings.probe, device)
    _refuse_reserved_names(rows)
    names = list(rows.recons)
    found: dict[str, Json] = {name: {} for name in names}
    sets = _group_probes(rows.probes)
    with sharing_cores(device) as cores:
        backend, _ = choose_backend(settings.probe, device)

        def probe(group: Sequence[RowProbe]) -> list[list[Json]]:
            chosen = torch.from_numpy(group[0].rows)
            x = _select_rows(rows.x, chosen, device)
            recons = (_select_rows(rows.recons[name], chosen, device) for name in names)
            by_sae = measure_rows(x, recons, _targets(rows, group), settings, backend)
            return [[as_record(result) for result in results] for results in by_sae]

        with closing(cores.map_in_order(sets, probe, "probes")) as measured:
            for group, by_sae in measured:
                for name, records in zip(names, by_sae, strict=True):
                    found[name] |= zip((one.name for one in group), records, strict=True)
    reasons = [record.get("reason") for records in found.values() for record in records.values()]
    if reasons and all(reasons):
        raise RequestError(f"none of the probes can be measured: {reasons[0]}: add rows, or set fewer `folds`")
    x = torch.from_numpy(rows.x)
    return RowsResult({name: _result(rows, found[name], x, name) for name in names}, rows, settings)


def _group_probes(probes: Sequence[RowProbe]) -> list[list[RowProbe]]:
    """Return the probes grouped by dataset and rows, as in a run, so that sums have the same order."""
    groups: dict[tuple[str, bytes], list[RowProbe]] = {}
    for probe in probes:
        groups.setdefault((probe.dataset, probe.rows.tobytes()), []).append(probe)
    return list(groups.values())


def _targets(rows: Rows, group: Sequence[RowProbe]) -> Targets:
    chosen = group[0].rows
    labels = np.stack([probe.labels for probe in group])
    return Targets(
        labels,
        rows.groups[chosen],
        weights=None if rows.weights is None else rows.weights[chosen],
        tokens=None if rows.tokens is None else rows.tokens[chosen],
        order=None if rows.order is None else rows.order[chosen],
    )


def _select_rows(matrix: np.ndarray, rows: Tensor, device: str) -> Tensor:
    return torch.from_numpy(matrix).index_select(0, rows).to(device)


def _result(rows: Rows, records: Json, x: Tensor, name: str) -> CellResult:
    in_order = {probe.name: records[probe.name] for probe in rows.probes}
    with_q = with_q_values({0: {0: in_order}})[0][0]
    figures = _figures(x, torch.from_numpy(rows.recons[name]))
    if figures.mse_pos is not None and not math.isfinite(figures.mse_pos):
        raise ArithmeticError(f"{name}: its squared error overflows float32")
    return CellResult(figures, with_q, {})


@dataclass(frozen=True)
class _NoLatents:
    """Empty codes, for rows that have a reconstruction only."""

    crow: Tensor
    col: Tensor
    value: Tensor


def _figures(x: Tensor, recon: Tensor) -> Reconstruction:
    """Return the figures over all rows of the file; figures of codes and whole texts are None."""
    sums = ReconstructionSums.empty(x.shape[1], 0, "cpu")
    none = torch.empty(0, dtype=torch.int64)
    sums.probed.add(x, recon, _NoLatents(torch.zeros(len(x) + 1, dtype=torch.int64), none, torch.empty(0)))
    return replace(sums.figures(), l0=None, l1=None)


def _record(found: CellResult) -> Json:
    return {**{name: getattr(found.figures, name) for name in FIGURES}, **found.records}


def _refuse_reserved_names(rows: Rows) -> None:
    """Raise `RequestError` if a probe has the name of a figure, or an SAE the name `_run`: they share a mapping."""
    for probe in rows.probes:
        if probe.name in FIGURES:
            raise RequestError(
                f"a probe may not have the name {probe.name!r}, which is a figure of the record: rename it"
            )
    if "_run" in rows.recons:
        raise RequestError("an SAE may not have the name '_run': rename it")
