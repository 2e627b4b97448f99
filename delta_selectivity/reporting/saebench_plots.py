"""Plot the figures of SAEBench and of this program: sparse probing by k, and explained variance by L0."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from delta_selectivity.records.saebench import Evaluation
from delta_selectivity.reporting.drawing import Drawing, Plot, add_title, axes_at, canvas
from delta_selectivity.reporting.names import short_names
from delta_selectivity.reporting.saebench import SAEBENCH_KS, at_layers_of, measured_by
from delta_selectivity.reporting.styles import characters, series

WIDTH, HEIGHT, LEFT = 560, 320, 56  # pixels
LEGEND_ROW = 16
MAX_EVALUATIONS = 24  # evaluations in a plot
ALL = "all"
"""Axis position of a probe on all latents."""


def beside_plots(own: Sequence[Evaluation], theirs: Sequence[Evaluation]) -> list[Plot]:
    """Return a plot for each kind of evaluation in `theirs`."""
    plots = []
    for core in (False, True):
        chosen = [one for one in (*at_layers_of(own, theirs), *theirs) if one.is_core == core]
        points = [(one, known) for one in chosen if (known := _points(one))]
        if points and any(one.is_core == core for one in theirs):
            plots.append(_plot(core, points[:MAX_EVALUATIONS], len(points)))
    return plots


def _points(one: Evaluation) -> list[tuple[float, float]]:
    """Return the points to draw: (k, accuracy), or (L0, explained variance)."""
    if one.is_core:
        pair = tuple(one.metrics.get(name) for name in ("l0", "explained_variance"))
        return [(pair[0], pair[1])] if pair[0] is not None and pair[1] is not None else []
    values = (one.metrics.get(f"sae_top_{k}_test_accuracy") for k in SAEBENCH_KS)
    return [(float(k), value) for k, value in zip(SAEBENCH_KS, values, strict=True) if value is not None]


def _plot(core: bool, points: Sequence[tuple[Evaluation, list[tuple[float, float]]]], n: int) -> Plot:
    what = "Explained variance and L0" if core else "Probes on few latents"
    title = f"{what}: SAEBench and this program"
    x, y = ("l0", "explained_variance") if core else ("k", "accuracy")
    left_out = f" Only the first {len(points)} of {n} are shown." if n > len(points) else ""
    description = (
        "A point for each SAE and layer: explained variance against L0. "
        if core
        else "A line for each SAE and layer: mean accuracy of probes on 1, 2 and 5 latents. "
    ) + f"Filled: this program. Hollow: SAEBench, on other tasks, texts and splits.{left_out}"
    rows = tuple(
        (one.sae, measured_by(one), one.layer, *point) for one, known in points for point in known
    )  # fmt: skip
    draw = partial(_draw, core, title, points)
    return Plot(
        f"saebench_{'core' if core else 'few_latents'}", title, description, draw,
        ("sae", "measured_by", "layer", x, y), rows,
    )  # fmt: skip


def _draw(core: bool, title: str, points: Sequence[tuple[Evaluation, list[tuple[float, float]]]]) -> Drawing:
    figure = canvas(WIDTH, HEIGHT + LEGEND_ROW * len(points) + 8)
    add_title(figure, title, "filled: this program; hollow: SAEBench, on other tasks, texts and splits")
    axes = axes_at(figure, LEFT, 44, WIDTH - LEFT - 20, HEIGHT - 96)
    axes.grid()
    axes.set(
        xlabel="L0 (latents per token)" if core else "latents that the probe may use",
        ylabel="explained variance" if core else "accuracy",
    )
    if not core:
        axes.set_xscale("log")
        axes.set_xticks(SAEBENCH_KS, [str(k) for k in SAEBENCH_KS])
        axes.minorticks_off()
    axes.margins(0.08)
    names = short_names([named(one) for one, _ in points], characters(WIDTH - 60, 10))
    saes = list(dict.fromkeys((one.sae, one.is_ours) for one, _ in points))
    tips: dict[str, str] = {}
    for number, ((one, known), name) in enumerate(zip(points, names, strict=True)):
        style, gid = series(saes.index((one.sae, one.is_ours))), f"evaluation-{number}"
        axes.plot(
            *zip(*known, strict=True), color=style.colour, marker=style.marker, markersize=7, gid=gid, label=name,
            linestyle="-" if one.is_ours else "--", markerfacecolor=style.colour if one.is_ours else "none",
        )  # fmt: skip
        tips[gid] = f"{named(one)}: {', '.join(f'{x:g}: {y:.3f}' for x, y in known)}"
    figure.legend(loc="lower left", bbox_to_anchor=(0, 0), borderaxespad=0, borderpad=0.2, labelspacing=0.35)
    return Drawing(figure, tips)


def named(one: Evaluation) -> str:
    """Return the name of the SAE, its layer, and the author of the evaluation."""
    layer = "" if one.layer is None else f", layer {one.layer}"
    return f"{one.sae}{layer} ({measured_by(one)})"
