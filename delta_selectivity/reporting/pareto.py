"""Plot delta_sel against FVU and against L0."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter

from delta_selectivity.reporting.drawing import DPI, Drawing, Plot, add_title, axes_at, canvas
from delta_selectivity.reporting.names import short_names
from delta_selectivity.reporting.numbers import number, signed, span, typeset
from delta_selectivity.reporting.study import Sae, Study
from delta_selectivity.reporting.styles import MUTED, characters, series

WIDTH, HEIGHT = 352, 300  # pixels, without the legend
LEFT = 64  # margin for the numbers of the vertical axis
LEGEND_ROW = 17
FIGURES = {"fvu_pos": "FVU (fvu_pos: variance unexplained at the probed positions)", "l0": "L0 (latents per row)"}
DIGITS = {"fvu_pos": ".3f", "l0": ".1f"}
SPREAD = 8  # ratio of largest to smallest value from which the horizontal axis is logarithmic
COLUMNS = ("sae", "layer", "delta_sel", "ci_low", "ci_high")


@dataclass(frozen=True)
class Point:
    """Mean of an SAE over all cells, or over the probes of one layer."""

    sae: Sae
    layer: int | None  # None: over all layers
    x: float
    delta: float
    low: float | None = None  # 95 % interval, available for the mean over all layers
    high: float | None = None


def pareto(study: Study, key: str) -> Plot | None:
    """Plot mean delta_sel against a reconstruction figure; None if it was not measured."""
    saes = study.shown_in_full
    large = [point for sae in saes if (point := _mean(sae, key))]
    if not large:
        return None
    small = [point for sae in saes for point in _by_layer(sae, key)]
    references = _reference(study)
    short = FIGURES[key].partition(" ")[0]
    description = (
        f"Mean delta_sel of each SAE against its mean {short}, with 95 % intervals. Small markers: means over the "
        "probes of one layer. Dashed lines: baselines. Better SAEs are higher; cheaper ones are further left."
    )
    data = tuple((p.sae.label, p.layer, p.x, p.delta, p.low, p.high) for p in [*large, *small])
    reference = tuple(
        (baseline.label, None, None, baseline.overall("delta_sel")[0], None, None) for baseline in study.baselines
    )
    columns = (*COLUMNS[:2], key, *COLUMNS[2:])
    draw = partial(_draw, study, key, large, small, references)
    return Plot(
        f"delta_against_{short.lower()}", f"delta_sel against {short}", description, draw, columns, data + reference
    )


def _mean(sae: Sae, key: str) -> Point | None:
    x, (delta, low, high) = sae.mean_figure(key), sae.overall("delta_sel")
    return None if x is None or delta is None else Point(sae, None, x, delta, low, high)


def _by_layer(sae: Sae, key: str) -> list[Point]:
    layers: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for cell in sae.measured:
        if cell.figures[key] is not None:
            layers[cell.layer].append((cell.figures[key], cell.result["delta_sel"]))
    return [
        Point(sae, layer, sum(x for x, _ in points) / len(points), sum(delta for _, delta in points) / len(points))
        for layer, points in sorted(layers.items())
    ]


def _reference(study: Study) -> dict[str, tuple[float, float]]:
    """Return kind of baseline -> minimum and maximum mean delta_sel; empty if there are no SAEs to compare."""
    values_of: dict[str, list[float]] = defaultdict(list)
    for baseline in study.baselines if study.saes else ():
        value = baseline.overall("delta_sel")[0]
        if value is not None:
            values_of[str(baseline.kind)].append(value)
    return {kind: (min(values), max(values)) for kind, values in values_of.items()}


def _draw(
    study: Study, key: str, large: Sequence[Point], small: Sequence[Point], references: dict[str, tuple[float, float]]
) -> Drawing:
    figure = canvas(WIDTH, HEIGHT + LEGEND_ROW * len(large) + 6)
    add_title(
        figure, f"delta_sel against {FIGURES[key].partition(' ')[0]}", "mean and 95 % interval; small: single layers"
    )
    axes = axes_at(figure, LEFT, 44, WIDTH - LEFT - 62, HEIGHT - 90)
    axes.grid()
    axes.set(xlabel=FIGURES[key], ylabel="mean delta_sel")
    axes.axhline(0, color=MUTED, linestyle=":", linewidth=1)
    _scale(axes, [point.x for point in [*large, *small]])
    labels = [point.sae.label for point in large]
    names = dict(zip(labels, short_names(labels, characters(WIDTH - 60, 10)), strict=True))
    tips: dict[str, str] = {}
    for index, point in enumerate([*small, *large]):
        tips |= _point(axes, study, point, key, f"point-{index}", names.get(point.sae.label, ""))
    if key == "l0":
        _frontier(axes, large)
    _lines(axes, references)
    figure.legend(loc="lower left", bbox_to_anchor=(0, 0), borderaxespad=0, borderpad=0.2, labelspacing=0.35)
    return Drawing(figure, tips)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) >= SPREAD * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.1, y=0.1)


def _point(axes: Axes, study: Study, point: Point, key: str, gid: str, name: str) -> dict[str, str]:
    style = series(study.shown_in_full.index(point.sae))
    where = "mean" if point.layer is None else f"layer {point.layer}"
    x = number(point.x, DIGITS[key])
    tip = f"{point.sae.label}, {where}: {signed(point.delta, 4)} at {typeset(x)}"
    if point.layer is not None:
        axes.plot(point.x, point.delta, marker=style.marker, color=style.colour, markersize=3.5, alpha=0.5, gid=gid)
        return {gid: tip}
    if point.low is not None and point.high is not None:
        axes.vlines(point.x, point.low, point.high, color=style.colour, linewidth=2)
        tip = f"{tip} ({span(point.low, point.high, 4)})"
    axes.plot(
        point.x, point.delta, marker=style.marker, color=style.colour, markersize=9, gid=gid, linestyle="none",
        markeredgecolor="white", label=f"\u200b{name}" if name.startswith("_") else name,
    )  # fmt: skip
    return {gid: tip}


def _frontier(axes: Axes, points: Sequence[Point]) -> None:
    """Draw a line through the SAEs for which no other SAE has both fewer latents and a higher delta_sel."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.delta)):
        if not best or point.delta > best[-1].delta:
            best.append(point)
    if len(best) > 1:
        axes.step([p.x for p in best], [p.delta for p in best], where="post", color=MUTED, linewidth=1, zorder=1)


def _lines(axes: Axes, references: dict[str, tuple[float, float]]) -> None:
    """Draw a labelled dashed line for each kind of baseline, or a band if there are several of a kind."""
    for low, high in references.values():
        axes.axhspan(low, high, facecolor=MUTED, alpha=0.12, linewidth=0)
        axes.axhline((low + high) / 2, color=MUTED, linestyle="--", linewidth=1)
    bottom, top = axes.get_ylim()
    line = 12 * (top - bottom) / (axes.bbox.height * DPI / axes.figure.dpi)  # height of a label, in delta_sel
    below = top + line
    for kind, (low, high) in sorted(references.items(), key=lambda mark: -sum(mark[1])):
        below = min((low + high) / 2, below - line)  # below the previous label, without overlap
        axes.annotate(
            kind, xy=(1, below), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=9.5, color=MUTED, annotation_clip=False,
        )  # fmt: skip
