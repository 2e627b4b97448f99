"""Small multiples by layer: how much an SAE preserves of each probe, and where two SAEs differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator

from delta_selectivity.errors import RequestError
from delta_selectivity.probing.probe_statistics import ProbeScores
from delta_selectivity.records import scores
from delta_selectivity.reporting.drawing import Drawing, Plot, add_title, axes_at, canvas
from delta_selectivity.reporting.names import short_names
from delta_selectivity.reporting.rows import places
from delta_selectivity.reporting.study import Cell, Sae, Study
from delta_selectivity.reporting.styles import MUTED, TEXT_COLOUR, characters, series, shortened

WIDTH, COLUMNS_OF_PANELS = 352, 2  # pixels; two panels side by side fit on a phone
PANEL, HEAD, LEFT = 96, 38, 34  # height of a panel with its title, and margins above the first and to the left
LEGEND_ROW = 17
MAX_LAYER_TICKS = 7  # maximum number of layers that each have a tick
MAX_SAES = 8  # maximum number of SAEs that each have a plot
PAIRS = 3  # number of SAEs that are overlaid with the next one, starting with the best
LEVEL = 0.05  # of the false discovery rate over the cells of a pair
DEPTH = ("sae", "dataset", "probe", "layer", "model_sel", "sae_sel", "transfer_sel", "verdict")
OVERLAY = ("sae", "compared_with", "dataset", "probe", "layer", "sae_sel", "other_sae_sel", "difference", "ci_low",
           "ci_high", "q_value")  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One curve of a panel: selectivity by layer."""

    values: Mapping[int, float]
    style: Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """One probe of one dataset."""

    probe: str
    lines: tuple[Line, ...]
    shaded: tuple[tuple[int, float, float], ...] = ()  # significant layers, with the selectivity of both SAEs


def depth(study: Study, sae: Sae, name: str) -> Plot | None:
    """Plot, by layer, the model, the refitted probe and the model's own probe; None if nothing was measured."""
    colour = series(study.shown_in_full.index(sae)).colour
    styles: dict[str, dict[str, Any]] = {
        "model_sel": {"color": TEXT_COLOUR, "linewidth": 1.6},
        "sae_sel": {"color": colour, "linewidth": 1.6, "marker": "o", "markersize": 2.5},
        "transfer_sel": {"color": colour, "linewidth": 1.3, "dashes": (3, 1.5)},
    }
    panels = [
        Panel(probe, tuple(Line(_by_layer(cells, key), style) for key, style in styles.items()))
        for probe, cells in _probes(study, sae)
    ]
    if not panels:
        return None
    rows = tuple(
        (sae.label, cell.dataset, cell.probe, cell.layer, *(cell.result.get(key) for key in DEPTH[4:7]), cell.verdict)
        for cell in sae.measured
    )
    description = (
        "For each probe, balanced accuracy by layer. The model's activations have the colour of the text; a probe "
        f"fitted anew on {sae.label} is solid, the model's own probe on it dashed. Chance (0.5) is dotted."
    )
    names = {"model_sel": "model", "sae_sel": "SAE, probe fitted anew", "transfer_sel": "SAE, the model's probe"}
    legend = [(names[key], style) for key, style in styles.items()]
    draw = partial(_draw, sae.label, "balanced accuracy by layer", panels, legend, _limits(study))
    return Plot(name, f"Accuracy by layer: {sae.label}", description, draw, DEPTH, rows)


def overlays(study: Study) -> list[tuple[Sae, Sae]]:
    """Return the pairs of SAEs to overlay: each SAE and the next, in descending order of mean delta_sel."""
    pairs = [(pair.one, pair.other) for pair in study.neighbours if not pair.one.is_baseline]
    return pairs[:PAIRS]


def overlay(study: Study, one: Sae, other: Sae, name: str) -> Plot | None:
    """Plot two SAEs by layer, with significant paired differences shaded; None if no scores can be paired."""
    tested = _paired_tests(one, other)
    if not tested:
        return None
    panels: dict[tuple[str, str], Panel] = {}
    thin = {"color": TEXT_COLOUR, "linewidth": 1.0, "alpha": 0.6}
    styles = {
        sae.label: {"color": series(study.shown_in_full.index(sae)).colour, "linewidth": 1.6} for sae in (one, other)
    }
    for dataset, probe in study.panel_probes:
        cells = [sae.where(dataset, probe) for sae in (one, other)]
        model = Line(_by_layer(cells[0], "model_sel"), thin)
        curves = (Line(_by_layer(c, "sae_sel"), styles[s.label]) for c, s in zip(cells, (one, other), strict=True))
        shaded = tuple(
            (layer, cells[0][layer].result["sae_sel"], cells[1][layer].result["sae_sel"])
            for (where, of, layer), test in tested.items()
            if (where, of) == (dataset, probe) and test[3] < LEVEL
        )
        if all(cells):
            panels[dataset, probe] = Panel(probe, (model, *curves), shaded)
    rows = tuple(
        (one.label, other.label, dataset, probe, layer,
         *(sae.where(dataset, probe)[layer].result["sae_sel"] for sae in (one, other)), *test)
        for (dataset, probe, layer), test in tested.items()
    )  # fmt: skip
    n_shaded = sum(len(panel.shaded) for panel in panels.values())
    description = (
        f"For each probe, balanced accuracy by layer of {one.label} and {other.label}; the model is a thin line. The "
        f"{n_shaded} shaded cells have a significant paired difference (q < {LEVEL} over the {len(tested)} cells with "
        "scores)."
    )
    legend: list[tuple[str, Mapping[str, Any]]] = [("model", thin), *styles.items()]
    note = f"shaded: significant difference (q < {LEVEL})"
    title = " and ".join(short_names([one.label, other.label], characters(WIDTH - 60, 12) // 2))
    draw = partial(_draw, title, note, list(panels.values()), legend, _limits(study))
    return Plot(name, f"{one.label} and {other.label} by layer", description, draw, OVERLAY, rows)


def _probes(study: Study, sae: Sae) -> list[tuple[str, dict[int, Cell]]]:
    probes = [(probe, sae.where(dataset, probe)) for dataset, probe in study.panel_probes]
    return [(probe, cells) for probe, cells in probes if cells]


def _by_layer(cells: Mapping[int, Cell], key: str) -> dict[int, float]:
    known = {layer: cell.result.get(key) for layer, cell in sorted(cells.items())}
    return {layer: value for layer, value in known.items() if value is not None}


def _paired_tests(one: Sae, other: Sae) -> dict[tuple[str, str, int], tuple[float, float, float, float]]:
    """Return (dataset, probe, layer) -> difference of sae_sel, its 95 % interval, q; for cells with stored scores."""
    from delta_selectivity.probing.uncertainty import benjamini_hochberg  # imports scipy, seldom needed
    from delta_selectivity.records.sae_level import difference

    estimates = {}
    scores_of_one, scores_of_other = _stored_scores(one), _stored_scores(other)
    for place in [place for place in scores_of_one if place in scores_of_other]:
        estimate = difference({("", 0, ""): scores_of_one[place]}, {("", 0, ""): scores_of_other[place]})
        if estimate is not None:
            estimates[place] = estimate
    q_values = benjamini_hochberg([estimate.p_value for estimate in estimates.values()]) if estimates else []
    return {
        place: (estimate.value, estimate.low, estimate.high, 1.0 if q is None else q)
        for (place, estimate), q in zip(estimates.items(), q_values, strict=True)
    }


def _stored_scores(sae: Sae) -> dict[tuple[str, str, int], ProbeScores]:
    """Return the stored scores of an SAE's files, by the dataset's name in the report, probe and layer."""
    scores_of_cell: dict[tuple[str, str, int], ProbeScores] = {}
    loaded: dict[tuple[Path, int], Mapping[str, ProbeScores]] = {}
    for cell, ((path, content), layer, probe) in zip(sae.cells, places(sae), strict=True):
        if (path, layer) not in loaded:
            loaded[path, layer] = _scores_of_layer(path, content["_run"]["key"], layer)
        if probe in loaded[path, layer] and cell.measured:
            scores_of_cell[cell.dataset, cell.probe, layer] = loaded[path, layer][probe]
    return scores_of_cell


def _scores_of_layer(path: Path, key: Mapping[str, Any], layer: int) -> Mapping[str, ProbeScores]:
    """Return the scores of a layer of a result file; empty if they are missing or from another run."""
    try:
        kept = scores.load(scores.path_of(path, layer))
    except RequestError:
        return {}
    return kept.probes if kept.key == scores.key_digest(key) else {}


def _limits(study: Study) -> tuple[float, float]:
    """Return the limits of the vertical axis, which all these figures share."""
    keys = ("model_sel", "sae_sel", "transfer_sel")
    values_or_none = (cell.result.get(key) for sae in study.shown_in_full for cell in sae.measured for key in keys)
    values = [value for value in values_or_none if value is not None]
    return math.floor(min([0.5, *values]) * 20) / 20, math.ceil(max([0.6, *values]) * 20) / 20


def _draw(
    title: str,
    note: str,
    panels: Sequence[Panel],
    legend: Sequence[tuple[str, Mapping[str, Any]]],
    limits: tuple[float, float],
) -> Drawing:
    n_rows = math.ceil(len(panels) / COLUMNS_OF_PANELS)
    height = HEAD + PANEL * n_rows + LEGEND_ROW * len(legend) + 12
    figure = canvas(WIDTH, height)
    add_title(figure, title, note)
    layers = sorted({layer for panel in panels for line in panel.lines for layer in line.values})
    width = WIDTH / COLUMNS_OF_PANELS
    for place, panel in enumerate(panels):
        row, column = divmod(place, COLUMNS_OF_PANELS)
        axes = axes_at(figure, LEFT + width * column, HEAD + PANEL * row + 14, width - LEFT - 8, PANEL - 34)
        _panel(axes, panel, limits, layers)
    _legend(figure, legend)
    return Drawing(figure)


def _panel(axes: Axes, panel: Panel, limits: tuple[float, float], layers: Sequence[int]) -> None:
    axes.set(ylim=limits, xlim=(layers[0] - 0.5, layers[-1] + 0.5))
    axes.set_title(shortened(panel.probe, WIDTH / COLUMNS_OF_PANELS - LEFT - 8, 9), fontsize=9, loc="left", pad=2)
    axes.tick_params(labelsize=8, length=2)
    axes.grid(axis="y", linewidth=0.5)
    axes.axhline(0.5, color=MUTED, linestyle=":", linewidth=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
    axes.xaxis.set_major_locator(
        FixedLocator(layers) if len(layers) <= MAX_LAYER_TICKS else MaxNLocator(integer=True, nbins=5)
    )
    known = {layer for layer, *_ in panel.shaded}
    for layer, low, high in panel.shaded:
        axes.vlines(layer, low, high, color=MUTED, linewidth=5, alpha=0.45)
    for (a, *first), (b, *second) in zip(panel.shaded, panel.shaded[1:], strict=False):
        if not any(a < layer < b and layer not in known for layer in layers):
            axes.fill_between([a, b], [first[0], second[0]], [first[1], second[1]], color=MUTED, alpha=0.3, linewidth=0)
    for line in panel.lines:
        if line.values:
            marker = {"marker": "."} if len(line.values) == 1 and "marker" not in line.style else {}
            axes.plot(list(line.values), list(line.values.values()), **{**line.style, **marker})


def _legend(figure: Figure, legend: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    lines = [Line2D([], [], **style) for _, style in legend]
    names = short_names([name for name, _ in legend], characters(WIDTH - 60, 10))
    figure.legend(lines, names, loc="lower left", bbox_to_anchor=(0, 0), handlelength=2.6, borderaxespad=0,
                  borderpad=0.2, labelspacing=0.35)  # fmt: skip
