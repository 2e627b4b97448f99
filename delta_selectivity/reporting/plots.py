"""All plots of a report, in page order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from delta_selectivity.records import result_file
from delta_selectivity.reporting.depth import MAX_SAES, depth, overlay, overlays
from delta_selectivity.reporting.difference_matrix import difference_matrix
from delta_selectivity.reporting.drawing import Plot
from delta_selectivity.reporting.heatmaps import heatmap, scale
from delta_selectivity.reporting.levels import groups, panel
from delta_selectivity.reporting.means import differences, means
from delta_selectivity.reporting.pareto import FIGURES, pareto
from delta_selectivity.reporting.saebench import own_evaluations
from delta_selectivity.reporting.saebench_plots import beside_plots
from delta_selectivity.reporting.series import series_of
from delta_selectivity.reporting.series_plot import series_plot
from delta_selectivity.reporting.study import Study

PROBES_PER_HEATMAP = 12  # in a report with many datasets
PANELS_PER_FAMILY = 3


@dataclass(frozen=True)
class Plots:
    """The plots of a study by section of the report."""

    saes: tuple[Plot, ...]  # means of the SAEs, and their differences
    series: tuple[Plot, ...]  # checkpoints of a training by step
    tradeoffs: tuple[Plot, ...]  # delta_sel against FVU and L0
    depth: tuple[Plot, ...]  # by layer, all probes of an SAE in one plot
    scale: Plot  # the colour scale of all heatmaps
    heatmaps: dict[str, tuple[Plot, ...]]  # by dataset, or by family if there are many datasets
    levels: dict[str, tuple[Plot, ...]]  # likewise, by dataset or family
    beside: tuple[Plot, ...] = ()  # figures of SAEBench and of this program

    def __iter__(self) -> Iterator[Plot]:
        yield from (*self.saes, *self.series, *self.tradeoffs, *self.depth, self.scale)
        for part in self.heatmaps:
            yield from (*self.heatmaps[part], *self.levels[part])
        yield from self.beside


def plots_of(study: Study) -> Plots:
    """Return every plot for which the files have data."""
    names = _Names()
    compared = [plot(study, score) for plot in (means, differences) for score in ("transfer_r2", "delta_sel")]
    tradeoffs = [pareto(study, figure) for figure in FIGURES]
    return Plots(
        _without_none([*compared, difference_matrix(study)]),
        _without_none([series_plot(series, names.of("series", series.name)) for series in series_of(study)]),
        _without_none(tradeoffs),
        _without_none(_depth(study, names)),
        scale(study),
        {part: tuple(_heatmaps(study, part, datasets, names)) for part, datasets in parts(study).items()},
        {part: tuple(_levels(study, datasets, names)) for part, datasets in parts(study).items()},
        tuple(beside_plots(own_evaluations(study.files), study.beside)) if study.beside else (),
    )


def parts(study: Study) -> dict[str, list[str]]:
    """Return the sections with their datasets: one per dataset, or one per family if there are many datasets."""
    return study.families if study.has_many_datasets else {dataset: [dataset] for dataset in study.datasets}


def _without_none(plots: list[Plot | None]) -> tuple[Plot, ...]:
    return tuple(plot for plot in plots if plot is not None)


def _depth(study: Study, names: _Names) -> list[Plot | None]:
    """Return the plots by layer of the first `MAX_SAES` SAEs, and the overlays of pairs with stored scores."""
    single = [depth(study, sae, names.of("depth", sae.label)) for sae in study.shown_in_full[:MAX_SAES]]
    return [
        *single,
        *(overlay(study, *pair, names.of("by_layer", *(s.label for s in pair))) for pair in overlays(study)),
    ]


def _heatmaps(study: Study, part: str, datasets: Sequence[str], names: _Names) -> Iterator[Plot]:
    """Yield the heatmaps of a dataset or family; those of a family show the largest losses first."""
    probes = [(dataset, probe) for dataset in datasets for probe in study.datasets[dataset]]
    if study.has_many_datasets:
        probes.sort(key=lambda place: study.losses.get(place, float("inf")))
    size = PROBES_PER_HEATMAP if study.has_many_datasets else len(probes)
    for start in range(0, len(probes), size):
        shown = probes[start : start + size]
        for sae in study.shown_in_full:
            if any((cell.dataset, cell.probe) in shown for cell in sae.cells):
                yield heatmap(study, sae, part, shown, names.of("heatmap", part, sae.label))


def _levels(study: Study, datasets: Sequence[str], names: _Names) -> Iterator[Plot]:
    """Yield the panels of a dataset, or of the probes of a family with the largest losses."""
    probes = [(dataset, probe) for dataset in datasets for probe in study.datasets[dataset]]
    if study.has_many_datasets:
        probes = [place for place in study.losses if place in probes][:PANELS_PER_FAMILY]
    for dataset, probe in probes:
        for group in groups(study):
            plot = panel(study, group, dataset, probe, names.of("levels", dataset, probe, group[0].label))
            if plot is not None:
                yield plot


class _Names:
    """Generator of unique file names, also on file systems that ignore case."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def of(self, *parts: str) -> str:
        stem = result_file.slug("_".join(parts))
        name, number = stem, 1
        while name.casefold() in self._used:
            number += 1
            name = f"{stem}-{number}"
        self._used.add(name.casefold())
        return name
