"""Plot transfer_r2 with its interval against training steps."""

from __future__ import annotations

import math
from functools import partial

from matplotlib.ticker import EngFormatter

from delta_selectivity.reporting.drawing import Drawing, Plot, add_title, axes_at, canvas
from delta_selectivity.reporting.numbers import signed, span, typeset
from delta_selectivity.reporting.series import COLUMNS, Checkpoint, Series, lines
from delta_selectivity.reporting.styles import COLOURS

WIDTH, HEIGHT = 352, 240  # pixels
SPREAD = 50  # ratio of largest to smallest step from which the axis is logarithmic


def series_plot(series: Series, name: str) -> Plot | None:
    """Plot a series, with filled markers where surely better; None for fewer than two steps with transfer_r2."""
    known = [one for one in series.checkpoints if one.sae.overall("transfer_r2")[0] is not None]
    if len(known) < 2:
        return None
    description = (
        "transfer_r2 of each checkpoint with its 95 % interval. A filled dot is surely better than the previous one. "
        f"{series.sentence()}"
    )
    draw = partial(_draw, series, known)
    return Plot(name, f"transfer_r2 by step of {series.name}", description, draw, COLUMNS, tuple(lines(series)))


def _draw(series: Series, known: list[Checkpoint]) -> Drawing:
    figure = canvas(WIDTH, HEIGHT)
    add_title(figure, f"By step: {series.name}", "filled: surely better than the previous; band: 95 % interval")
    axes = axes_at(figure, 46, 42, WIDTH - 60, HEIGHT - 84)
    steps = [one.step for one in known]
    values, lows, highs = (
        [math.nan if value is None else value for value in part]
        for part in zip(*(one.sae.overall("transfer_r2") for one in known), strict=True)
    )
    if steps[0] > 0 and steps[-1] / steps[0] >= SPREAD:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.set_xlabel("revision of the model, step" if series.of_model else "step")
    axes.margins(x=0.04, y=0.12)
    axes.fill_between(steps, lows, highs, color=COLOURS[0], alpha=0.16, linewidth=0)
    axes.plot(steps, values, color=COLOURS[0], linewidth=1.4)
    tips: dict[str, str] = {}
    for number, (one, value, low, high) in enumerate(zip(known, values, lows, highs, strict=True)):
        fill = COLOURS[0] if one.surely_better else "white"
        axes.plot(one.step, value, "o", color=COLOURS[0], markerfacecolor=fill, markersize=7, gid=f"step-{number}")
        interval = "no interval" if math.isnan(low) else f"{typeset(f'{low:.4f}')} to {typeset(f'{high:.4f}')}"
        tips[f"step-{number}"] = f"step {one.step:,}: {typeset(f'{value:.4f}')} ({interval}){_changed(one)}"
    return Drawing(figure, tips)


def _changed(one: Checkpoint) -> str:
    if one.change is None:
        return ""
    value, low, high = (one.change[f"transfer_r2{end}"] for end in ("", "_ci_low", "_ci_high"))
    return f"; minus the previous {signed(value, 4)} ({span(low, high, 4)})"
