"""The result of one cell, with its warnings and its writer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from delta_selectivity.probing.probe_statistics import ProbeScores
from delta_selectivity.probing.selectivity import OUTLIER
from delta_selectivity.records.result_file import Json, RecordFile
from delta_selectivity.records.sae_level import without_q_values
from delta_selectivity.records.scores import LayerScores, key_digest, path_of, prune, save
from delta_selectivity.records.texts import keep as keep_texts
from delta_selectivity.run.downstream_figures import Downstream
from delta_selectivity.run.planning import Cell, Files
from delta_selectivity.run.reconstruction import Reconstruction
from delta_selectivity.system.memory import peak_memory
from delta_selectivity.system.stopwatch import Stopwatch

log = logging.getLogger(__name__)

ONE_PARTITION = "only one partition (repeats 1): the intervals do not include the variance due to the folds"
FEW_GROUPS = 100  # below this, intervals are wide and unreliable


@dataclass(frozen=True)
class CellResult:
    """The numbers of one subject, dataset and layer."""

    figures: Reconstruction
    records: Json  # probe -> its record, in the dataset's order
    scores: dict[str, ProbeScores]  # probe -> its out-of-fold scores, if it was measured


OnResult = Callable[[Cell, CellResult], None]
"""A function that handles the result of a cell."""


def result_writer(
    files: Files, clock: Stopwatch, texts: Callable[[int], bytes | None], downstream: Mapping[Cell, Downstream]
) -> OnResult:
    """Return a function that writes each result to its file: first the scores, then the record that marks it as done.

    texts: from `kept_texts`.
    downstream: downstream figures by cell, for those that have them.
    """

    def write(cell: Cell, found: CellResult) -> None:
        file, layer = files[cell.subject, cell.dataset], cell.site.layer
        for line in warnings_of(found, file.is_baseline):
            _warn(file, f"layer {layer}{line}")
        if file.key["repeats"] == 1:
            _warn(file, ONE_PARTITION)
        figures = asdict(found.figures) | (asdict(downstream[cell]) if cell in downstream else {})
        layers = {**without_q_values(file.layers), layer: {**figures, **found.records}}
        with clock.stage("write"):
            prune(file.path, layers)
            save(path_of(file.path, layer), LayerScores(layer, key_digest(file.key), found.scores))
            keep_texts(file.path, texts(cell.dataset))
            file.seconds, file.resources, file.complete = clock.seconds(), peak_memory(), False
            file.write(layers)

    return write


def warnings_of(found: CellResult, is_baseline: bool = False) -> list[str]:
    """Return warnings about these numbers, to be appended to the name of the layer."""
    lines = []
    figures = found.figures
    places = (("at the probed positions", figures.fvu_pos), ("over whole texts", figures.fvu_whole))
    poor = [f"{fvu:.2f} {where}" for where, fvu in places if fvu is not None and fvu > 1]
    if poor and not is_baseline:
        lines.append(
            f": FVU {' and '.join(poor)}{_without_outliers(figures)}: the SAE is worse than predicting the mean; "
            "does it belong to this model, layer and hook point?"
        )
    for name, result in found.records.items():
        if result.get("reason"):
            lines.append(f" {name}: not measured: {result['reason']}")
            continue
        if not result["converged"]:
            lines.append(f" {name}: {result['n_unconverged']} probe fits did not converge")
        n_people, effective = result["n_people"], result["n_people_effective"]
        if effective < n_people / 2:
            lines.append(
                f" {name}: {n_people} groups of unequal size are equivalent to {effective:.0f} groups of equal size"
            )
        elif n_people < FEW_GROUPS:
            lines.append(f" {name}: only {n_people} groups: the interval is unreliable")
    return lines


def _without_outliers(figures: Reconstruction) -> str:
    if not figures.outliers or figures.fvu_ordinary is None:
        return ""
    share = f"{100 * figures.outliers:.2g} % of the tokens, whose norm is above {OUTLIER:g} times the median"
    return f" ({figures.fvu_ordinary:.2f} there without {share})"


def _warn(file: RecordFile, line: str) -> None:
    """Store a warning with the numbers, and log it once."""
    if line not in file.warnings:
        file.warnings.append(line)
        level = logging.INFO if file.is_baseline else logging.WARNING  # the SAE's own warning is enough
        of = file.run["config"].get("sae_label")
        log.log(level, "%s%s: %s", file.path.name, f" of {of}" if of else "", line)
