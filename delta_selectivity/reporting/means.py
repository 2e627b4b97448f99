"""Plot the mean of each SAE with its interval, and the differences between SAEs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes

from delta_selectivity.reporting.drawing import Drawing, Plot, add_title, axes_at, canvas
from delta_selectivity.reporting.names import short_names
from delta_selectivity.reporting.numbers import number, probability, signed, span, typeset
from delta_selectivity.reporting.study import Sae, Study
from delta_selectivity.reporting.styles import MUTED, TEXT_COLOUR, characters, series

WIDTH = 352  # pixels
NAMES_WIDTH = 150  # of those, for the names on the left
ROW = 22
TITLES = {"delta_sel": "Mean delta_sel", "transfer_r2": "Mean transfer_r2"}
LEVEL_COLUMNS = ("sae", "mean", "ci_low", "ci_high")
PAIR_COLUMNS = ("sae", "compared_with", "difference", "ci_low", "ci_high", "p_value")


@dataclass(frozen=True)
class Estimate:
    """One row: a name, a value, its 95 % interval (None: unknown), and its style."""

    name: str
    value: float
    low: float | None
    high: float | None
    colour: str
    marker: str
    tip: str


def means(study: Study, score: str) -> Plot | None:
    """Plot the mean of a score for all SAEs, best first, and the baselines below; None if nothing was measured."""
    rows = [_mean(study, sae, score) for sae in study.saes_and_baselines]
    known = [row for row in rows if row is not None]
    if not known:
        return None
    n_saes = sum(row is not None for row in rows[: len(study.saes)])
    known = [*sorted(known[:n_saes], key=lambda row: -row.value), *known[n_saes:]]
    description = "A dot for each SAE with its 95 % interval, best first. Baselines are grey and below the SAEs."
    data = tuple((row.name, row.value, row.low, row.high) for row in known)
    draw = partial(_draw, TITLES[score], "over all cells, 95 % interval", known, 0.0 if score == "delta_sel" else 1.0)
    return Plot(f"mean_{score}", TITLES[score], description, draw, LEVEL_COLUMNS, data)


def _mean(study: Study, sae: Sae, score: str) -> Estimate | None:
    value, low, high = sae.overall(score)
    if value is None:
        return None
    tip = f"{sae.label}: {typeset(number(value, '+.4f' if score == 'delta_sel' else '.4f'))} ({span(low, high, 4)})"
    if sae.is_baseline:
        return Estimate(sae.label.removeprefix("baseline: "), value, low, high, MUTED, "o", tip)
    style = series(study.saes.index(sae))
    return Estimate(sae.label, value, low, high, style.colour, style.marker, tip)


def differences(study: Study, score: str) -> Plot | None:
    """Plot paired differences: each SAE and the next, each baseline and its SAE; None if no two can be compared."""
    pairs = [pair for pair in study.neighbours if pair.figures[score] is not None]
    if not pairs:
        return None
    title = f"Paired differences of {score}"
    labels = [sae.label.removeprefix("baseline: ") for sae in study.saes_and_baselines]
    short = dict(zip(labels, short_names(labels, characters((WIDTH - 40) / 2, 10)), strict=True))
    rows, data = [], []
    for pair in pairs:
        low, high, p = (pair.figures[f"{score}_{key}"] for key in ("ci_low", "ci_high", "p_value"))
        names = (pair.one.label.removeprefix("baseline: "), pair.other.label)
        name = " − ".join(short[name] for name in names)
        value = pair.figures[score]
        tip = f"{' − '.join(names)}: {signed(value, 4)} ({span(low, high, 4)}), p {probability(p)}"
        rows.append(Estimate(name, value, low, high, MUTED if pair.one.is_baseline else TEXT_COLOUR, "D", tip))
        data.append((pair.one.label, pair.other.label, value, low, high, p))
    description = (
        "The first SAE minus the second, on the same rows, folds and groups. The two differ significantly if the "
        "interval excludes 0."
    )
    draw = partial(_draw, title, "paired; 95 % interval", rows, 0.0, above=True)
    return Plot(f"differences_{score}", title, description, draw, PAIR_COLUMNS, tuple(data))


def _draw(title: str, note: str, rows: Sequence[Estimate], line: float, above: bool = False) -> Drawing:
    """Draw a row for each estimate, with its name to the left, or above it if names are long."""
    pitch, left = (38, 8) if above else (ROW, NAMES_WIDTH)
    figure = canvas(WIDTH, 50 + pitch * len(rows) + 30)
    add_title(figure, title, note)
    axes = axes_at(figure, left, 44, WIDTH - left - 12, pitch * len(rows))
    axes.set(ylim=(len(rows) - 0.5, -0.5), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.axvline(line, color=MUTED, linewidth=1, linestyle=":")
    axes.grid(axis="x")
    axes.locator_params(axis="x", nbins=4 if left == NAMES_WIDTH else 6)
    axes.margins(x=0.08)
    names = short_names([row.name for row in rows], characters(WIDTH - 20 if above else NAMES_WIDTH - 12, 10))
    tips: dict[str, str] = {}
    for y, (row, name) in enumerate(zip(rows, names, strict=True)):
        gid = f"row-{y}"
        place = y + (0.22 if above else 0)
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [place, place], color=row.colour, linewidth=2, gid=f"{gid}-interval")
        axes.plot(row.value, place, marker=row.marker, color=row.colour, markersize=7, gid=gid)
        _name(axes, name, y, above)
        tips |= {gid: row.tip, f"{gid}-interval": row.tip}
    return Drawing(figure, tips)


def _name(axes: Axes, name: str, y: int, above: bool) -> None:
    axes.annotate(
        name, xy=(0, y - 0.2 if above else y), xycoords=("axes fraction", "data"),
        xytext=(0 if above else -10, 0), textcoords="offset points", ha="left" if above else "right", va="center",
        fontsize=10, annotation_clip=False,
    )  # fmt: skip
