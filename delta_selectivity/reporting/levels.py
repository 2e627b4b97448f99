"""Plot model_sel and sae_sel by layer with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator

from delta_selectivity.reporting.drawing import Drawing, Plot, add_title, axes_at, canvas
from delta_selectivity.reporting.names import short_names
from delta_selectivity.reporting.study import Cell, Sae, Study
from delta_selectivity.reporting.styles import MUTED, TEXT_COLOUR, characters, series

WIDTH, HEIGHT = 352, 196  # of a panel without its legend, pixels
LEGEND_ROW = 17
MAX_SAES_PER_PANEL = 4  # maximum number of SAEs in one panel, so that bands do not hide each other
MAX_LAYER_TICKS = 10  # maximum number of layers that each have a tick
MAX_MARKERS = 12  # maximum number of markers on a curve
DASHES = {"identity": (1, 1.5), "random": (4, 2), "pca": (6, 2, 1, 2), "mean": (2, 1), "shuffled": (8, 2)}
OTHER_DASHES = (3, 1, 1, 1, 1, 1)
COLUMNS = ("dataset", "probe", "layer", "view", "sae", "balanced_accuracy", "ci_low", "ci_high")


@dataclass(frozen=True)
class Curve:
    """One curve of a panel."""

    label: str
    view: str  # whose selectivity: model or sae
    cells: Mapping[int, Cell]  # by layer
    style: dict[str, Any]  # colour, marker, ... as arguments of matplotlib's `plot`
    with_band: bool

    @property
    def points(self) -> list[tuple[int, float, float, float]]:
        """Return (layer, selectivity, ends of its interval), ordered by layer."""
        results = [(layer, cell.result) for layer, cell in sorted(self.cells.items())]
        return [
            (layer, result[f"{self.view}_sel"], result[f"{self.view}_ci_low"], result[f"{self.view}_ci_high"])
            for layer, result in results
        ]


def groups(study: Study) -> Iterator[tuple[Sae, ...]]:
    """Yield the SAEs that share panels. If some have baselines, each SAE has its own panels, which show these too."""
    have_baselines = any(baseline.belongs_to(sae) for baseline in study.baselines for sae in study.saes)
    size = 1 if have_baselines else MAX_SAES_PER_PANEL
    return (study.shown_in_full[start : start + size] for start in range(0, len(study.shown_in_full), size))


def panel(study: Study, group: Sequence[Sae], dataset: str, probe: str, name: str) -> Plot | None:
    """Plot the model and the group's SAEs on one probe; None if nothing was measured."""
    curves = [curve for curve in _curves(study, group, dataset, probe) if curve.cells]
    if not curves:
        return None
    names = ", ".join(sae.label for sae in group)
    description = (
        f"Balanced accuracy by layer of probes for {probe}. The model's activations have the colour of the text, "
        f"{names} other colours; bands are 95 % intervals. Baselines are dashed, chance (0.5) is dotted."
    )
    rows = tuple((dataset, probe, layer, c.view, c.label, *values) for c in curves for layer, *values in c.points)
    draw = partial(_draw, probe, dataset, curves, _limits(study, dataset))
    return Plot(name, f"model_sel and sae_sel of {probe} by layer ({names})", description, draw, COLUMNS, rows)


def _curves(study: Study, group: Sequence[Sae], dataset: str, probe: str) -> Iterator[Curve]:
    of_model = _model_cells([sae.where(dataset, probe) for sae in group])
    for number, cells in enumerate(of_model, 1):
        label = "model" if len(of_model) == 1 else f"model, measured {number} times ({number})"
        yield Curve(label, "model", cells, {"color": TEXT_COLOUR, "linewidth": 2}, True)
    for sae in group:
        colours = series(study.shown_in_full.index(sae))
        cells = sae.where(dataset, probe)
        step = max(len(cells) // MAX_MARKERS, 1)
        style = {
            "color": colours.colour,
            "marker": colours.marker,
            "markersize": 5,
            "markevery": step,
            "linewidth": 1.6,
        }
        yield Curve(sae.label, "sae", cells, style, True)
    for baseline in study.baselines_of(group):
        style = {"color": MUTED, "dashes": DASHES.get(str(baseline.kind), OTHER_DASHES), "linewidth": 1.2}
        yield Curve(str(baseline.kind), "sae", baseline.where(dataset, probe), style, False)


def _model_cells(cells_of_saes: Sequence[Mapping[int, Cell]]) -> list[dict[int, Cell]]:
    """Return the model's cells by layer: once if all runs agree, else once for each distinct measurement."""
    kept: list[dict[int, Cell]] = []
    for cells in cells_of_saes:
        matching = (
            known for known in kept if all(_same(known[layer], cells[layer]) for layer in known.keys() & cells.keys())
        )
        same = next(matching, None)
        if same is None:
            kept.append(dict(cells))
        else:
            same.update({layer: cell for layer, cell in cells.items() if layer not in same})
    return kept


def _same(one: Cell, other: Cell) -> bool:
    return bool(one.result["model_sel"] == other.result["model_sel"])


def _limits(study: Study, dataset: str) -> tuple[float, float]:
    """Return the limits of the vertical axis, which all panels of a dataset share."""
    results = [cell.result for sae in study.saes_and_baselines for cell in sae.measured if cell.dataset == dataset]
    ends = [result[f"{view}_{end}"] for result in results for view in ("model", "sae") for end in ("ci_low", "ci_high")]
    known = [end for end in ends if end is not None]
    return math.floor(min([0.5, *known]) * 20) / 20, math.ceil(max([0.6, *known]) * 20) / 20


def _draw(probe: str, dataset: str, curves: Sequence[Curve], limits: tuple[float, float]) -> Drawing:
    baselines = [curve for curve in curves if not curve.with_band]
    sae_curves = [curve for curve in curves if curve.with_band]
    n_rows = len(sae_curves) + math.ceil(len(baselines) / 3)
    figure = canvas(WIDTH, HEIGHT + LEGEND_ROW * n_rows + 6)
    add_title(figure, probe, f"balanced accuracy, {dataset}")
    axes = axes_at(figure, 40, 42, WIDTH - 48, HEIGHT - 78)
    axes.set(ylim=limits, xlabel="layer")
    axes.grid(axis="y")
    axes.axhline(0.5, color=MUTED, linestyle=":", linewidth=1)
    layers = sorted({layer for curve in curves for layer in curve.cells})
    axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    axes.xaxis.set_major_locator(
        FixedLocator(layers) if len(layers) < MAX_LAYER_TICKS else MaxNLocator(integer=True, nbins=10)
    )
    tips: dict[str, str] = {}
    for number, curve in enumerate(curves):
        offset = (number + 0.5) / len(curves) - 0.5 if len(layers) == 1 else 0.0  # offset bars to avoid overlap
        tips |= _line(axes, curve, f"curve-{number}", 0.7 * offset)
    height = figure.get_size_inches()[1] * 72
    _legend(figure, sae_curves, 1, (n_rows - len(sae_curves)) * LEGEND_ROW / height)
    _legend(figure, baselines, 3, 0)
    return Drawing(figure, tips)


def _line(axes: Axes, curve: Curve, gid: str, offset: float) -> dict[str, str]:
    places, values, lows, highs = zip(*curve.points, strict=True)
    layers = [layer + offset for layer in places]
    low, high = ([math.nan if end is None else end for end in ends] for ends in (lows, highs))
    axes.plot(layers, values, gid=gid, **curve.style)
    if curve.with_band and len(layers) > 1:
        axes.fill_between(layers, low, high, color=curve.style["color"], alpha=0.16, linewidth=0)
    elif curve.with_band:
        axes.vlines(layers, low, high, color=curve.style["color"], linewidth=1.4)
    if len(layers) == 1 and "marker" not in curve.style:
        axes.plot(layers, values, "_", color=curve.style["color"], markersize=18)
    return {gid: curve.label}


def _legend(figure: Figure, curves: Sequence[Curve], columns: int, bottom: float) -> None:
    """Draw the legend below the axes, from the left."""
    lines = [Line2D([], [], **curve.style) for curve in curves]
    labels = short_names([curve.label for curve in curves], characters((WIDTH - 40) / columns - 30, 10))
    if lines:
        figure.legend(
            lines, labels, loc="lower left", bbox_to_anchor=(0, bottom), ncols=columns, handlelength=2.6,
            borderaxespad=0, borderpad=0.2, labelspacing=0.35, columnspacing=1.2,
        )  # fmt: skip
