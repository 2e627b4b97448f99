"""Check the figures of a result file before anything is computed from them.

fault({"layer_0": {"fvu_pos": "0.1", ...}}, {"compared": {}})   # "layer_0: 'fvu_pos' is no number"
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from typing import Any

Json = dict[str, Any]

LAYER = re.compile(r"layer_(0|[1-9][0-9]{0,5})")
MAX_MAGNITUDE = 1e100  # of any figure; squares of bfloat16 values reach 1e77
LAYER_FIGURES = ("fvu_pos", "l0")
"""Figures that every layer has; each may be null."""
PROBE_FIGURES = (
    "model_sel", "model_ci_low", "model_ci_high", "sae_sel", "sae_ci_low", "sae_ci_high",
    "delta_sel", "ci_low", "ci_high", "n_people",
)  # fmt: skip
"""Numbers that every probe without a `reason` has."""
NULLABLE_PROBE_FIGURES = ("transfer_sel", "transfer_r2", "detectable")
"""Further figures that each of these probes has; each may be null."""
TEST_SUFFIXES = ("_ci_low", "_ci_high", "_p_value")  # of the figures that accompany a difference of two SAEs
BOUNDED = re.compile(r"(\w+_)?(sel|auc|[pq]_value)")
"""Figures between 0 and 1, or differences of such figures."""
ROUNDING = 1e-6  # tolerance: a share is a sum, and rounding can take it above 1
MAX_NAME_LENGTH = 60  # maximum length of a name in an error message


def fault(results: Json, sae_level: Any) -> str | None:
    """Describe what is wrong with a file's layers or SAE-level figures; return None if they are valid."""
    return next(_faults(results, sae_level), None)


def missing(results: Json) -> str | None:
    """Describe the first figure that a report needs and a layer lacks; return None if there is none."""
    return next(_missing(results), None)


def is_number(value: Any) -> bool:
    """Return whether a value is a number that is finite as a float; booleans do not count."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_MAGNITUDE < value < MAX_MAGNITUDE


def _faults(results: Json, sae_level: Any) -> Iterator[str]:
    for layer, figures in results.items():
        if not LAYER.fullmatch(layer):
            yield f"{_quoted(layer)} is no layer"
        elif not isinstance(figures, dict):
            yield f"{layer} holds no figures"
        else:
            yield from _layer_faults(layer, figures)
    yield from _sae_level_faults(sae_level)


def _layer_faults(layer: str, figures: Json) -> Iterator[str]:
    probes = {name: value for name, value in figures.items() if isinstance(value, dict)}
    yield from _figure_faults(layer, {name: value for name, value in figures.items() if name not in probes})
    for probe, result in probes.items():
        where = f"{layer}, {_quoted(probe)}"
        if not isinstance(result.get("reason"), str | None):
            yield f"{where}: 'reason' is no text"
        yield from _figure_faults(where, {name: value for name, value in result.items() if name != "reason"})


def _missing(results: Json) -> Iterator[str]:
    for layer, figures in results.items():
        probes = {name: value for name, value in figures.items() if isinstance(value, dict)}
        needed = LAYER_FIGURES if probes else ()
        yield from (f"{layer}: '{name}' is missing" for name in needed if name not in figures)
        for probe, result in probes.items():
            if not result.get("reason"):
                missing_names = [name for name in PROBE_FIGURES if not is_number(result.get(name))]
                missing_names += [name for name in NULLABLE_PROBE_FIGURES if name not in result]
                yield from (f"{layer}, {_quoted(probe)}: '{name}' is missing" for name in missing_names)


def _figure_faults(where: str, figures: Json) -> Iterator[str]:
    for name, value in figures.items():
        if not (value is None or isinstance(value, bool) or is_number(value)):
            yield f"{where}: {_quoted(name)} is no number"
        elif BOUNDED.fullmatch(name) and value is not None and not math.fabs(value) <= 1 + ROUNDING:
            yield f"{where}: {_quoted(name)} is beyond 1"


def _sae_level_faults(level: Any) -> Iterator[str]:
    if not isinstance(level, dict) or not isinstance(level.get("compared"), dict):
        yield "'sae_level' holds no figures"
        return
    yield from _estimate_faults(
        "'sae_level'", {k: v for k, v in level.items() if k not in ("compared", "tasks")}, TEST_SUFFIXES[:2]
    )
    yield from _task_level_faults("'sae_level'", level.get("tasks", {}))
    for name, figures in level["compared"].items():
        where = f"'sae_level', compared with {_quoted(name)}"
        if isinstance(figures, dict):
            yield from (f"{where}: '{key}' is missing" for key in ("delta_sel", "transfer_r2") if key not in figures)
            yield from _estimate_faults(where, {k: v for k, v in figures.items() if k != "tasks"}, TEST_SUFFIXES)
            yield from _task_level_faults(where, figures.get("tasks", {}))
        else:
            yield f"{where}: no figures"


def _task_level_faults(where: str, tasks: Any) -> Iterator[str]:
    where = f"{where}, over tasks"
    families = tasks.get("families", {}) if isinstance(tasks, dict) else None
    if not isinstance(families, dict):
        yield f"{where}: no figures"
        return
    for figures in ({k: v for k, v in tasks.items() if k != "families"}, *families.values()):
        if isinstance(figures, dict):
            yield from _figure_faults(where, figures)
        else:
            yield f"{where}: no figures"


def _estimate_faults(where: str, figures: Json, ends: Collection[str]) -> Iterator[str]:
    yield from _figure_faults(where, figures)
    for score in ("delta_sel", "transfer_r2"):
        if figures.get(score) is not None:
            needed = [f"{score}{end}" for end in ends if not is_number(figures.get(f"{score}{end}"))]
            yield from (f"{where}: '{name}' is no number" for name in needed)


def _quoted(name: str) -> str:
    """Return a name from a file, shortened for an error message."""
    return f"'{name[:MAX_NAME_LENGTH]}...'" if len(name) > MAX_NAME_LENGTH else f"'{name}'"
