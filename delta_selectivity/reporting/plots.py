"""All plots of a report, in page order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from delta_selectivity.records import result_file
from delta_selectivity.reporting.depth import MOST, depth, overlay, overlays
from delta_selectivity.reporting.difference_matrix import rivals
from delta_selectivity.reporting.drawing import Plot
from delta_selectivity.reporting.heatmaps import heatmap, scale
from delta_selectivity.reporting.levels import groups, panel
from delta_selectivity.reporting.means import differences, means
from delta_selectivity.reporting.pareto import FIGURES, pareto
from delta_selectivity.reporting.saebench import ours
from delta_selectivity.reporting.saebench_plots import beside_plots
from delta_selectivity.reporting.series import series_of
from delta_selectivity.reporting.series_plot import series_plot
from delta_selectivity.reporting.study import Study

ACROSS = 12  # probes in a heatmap of a family
OF_A_FAMILY = 3  # probes of a family that have a panel


@dataclass(frozen=True)
class Plots:
    """The plots of a study by section of the report."""

    saes: tuple[Plot, ...]  # side by side
    series: tuple[Plot, ...]  # checkpoints of a training by step
    trade: tuple[Plot, ...]  # delta_sel against FVU and L0
    depth: tuple[Plot, ...]  # by layer, all probes of an SAE in one plot
    scale: Plot  # the colour scale of all heatmaps
    heatmaps: dict[str, tuple[Plot, ...]]  # by dataset, or by family if there are many datasets
    levels: dict[str, tuple[Plot, ...]]  # the same
    beside: tuple[Plot, ...] = ()  # SAEBench's figures and ours

    def __iter__(self) -> Iterator[Plot]:
        yield from (*self.saes, *self.series, *self.trade, *self.depth, self.scale)
        for part in self.heatmaps:
            yield from (*self.heatmaps[part], *self.levels[part])
        yield from self.beside


def plots_of(study: Study) -> Plots:
    """Return every plot for which the files have data."""
    names = _Names()
    compared = [plot(study, score) for plot in (means, differences) for score in ("transfer_r2", "delta_sel")]
    trade = [pareto(study, figure) for figure in FIGURES]
    return Plots(
        _there([*compared, rivals(study)]),
        _there([series_plot(series, names.of("series", series.name)) for series in series_of(study)]),
        _there(trade),
        _there(_depth(study, names)),
        scale(study),
        {part: tuple(_heatmaps(study, part, datasets, names)) for part, datasets in parts(study).items()},
        {part: tuple(_levels(study, datasets, names)) for part, datasets in parts(study).items()},
        tuple(beside_plots(ours(study.files), study.beside)) if study.beside else (),
    )


def parts(study: Study) -> dict[str, list[str]]:
    """Return the sections with their datasets: one per dataset, or one per family if there are many datasets."""
    return study.families if study.is_long else {dataset: [dataset] for dataset in study.datasets}


def _there(plots: list[Plot | None]) -> tuple[Plot, ...]:
    return tuple(plot for plot in plots if plot is not None)


def _depth(study: Study, names: _Names) -> list[Plot | None]:
    """Return the plots by layer, of the first SAEs if there are many, and the overlays of pairs with stored scores."""
    alone = [depth(study, sae, names.of("depth", sae.label)) for sae in study.in_full[:MOST]]
    return [
        *alone,
        *(overlay(study, *pair, names.of("by_layer", *(s.label for s in pair))) for pair in overlays(study)),
    ]


def _heatmaps(study: Study, part: str, datasets: Sequence[str], names: _Names) -> Iterator[Plot]:
    """Yield the heatmaps; those of a family show the largest losses first, a limited number per heatmap."""
    probes = [(dataset, probe) for dataset in datasets for probe in study.datasets[dataset]]
    if study.is_long:
        probes.sort(key=lambda place: study.losses.get(place, float("inf")))
    size = ACROSS if study.is_long else len(probes)
    for start in range(0, len(probes), size):
        shown = probes[start : start + size]
        for sae in study.in_full:
            if any((cell.dataset, cell.probe) in shown for cell in sae.cells):
                yield heatmap(study, sae, part, shown, names.of("heatmap", part, sae.label))


def _levels(study: Study, datasets: Sequence[str], names: _Names) -> Iterator[Plot]:
    """Yield the panels; for a family, of the probes with the largest losses."""
    probes = [(dataset, probe) for dataset in datasets for probe in study.datasets[dataset]]
    if study.is_long:
        probes = [place for place in study.losses if place in probes][:OF_A_FAMILY]
    for dataset, probe in probes:
        for group in groups(study):
            plot = panel(study, group, dataset, probe, names.of("levels", dataset, probe, group[0].label))
            if plot is not None:
                yield plot


class _Names:
    """Generator of unique file names, also on file systems that ignore case."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def of(self, *parts: str) -> str:
        stem = result_file.slug("_".join(parts))
        name, number = stem, 1
        while name.casefold() in self._given:
            number += 1
            name = f"{stem}-{number}"
        self._given.add(name.casefold())
        return name
