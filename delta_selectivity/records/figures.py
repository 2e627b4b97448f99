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
LARGEST = 1e100  # limit of any figure; squares of bfloat16 values reach 1e77
OF_A_LAYER = ("fvu_pos", "l0")
"""Figures that every layer has; each may be null."""
OF_A_PROBE = (
    "model_sel", "model_ci_low", "model_ci_high", "sae_sel", "sae_ci_low", "sae_ci_high",
    "delta_sel", "ci_low", "ci_high", "n_people",
)  # fmt: skip
"""Numbers that every probe without a `reason` has."""
OR_NULL = ("transfer_sel", "transfer_r2", "detectable")
"""Further figures of such a probe; each may be null."""
TESTED = ("_ci_low", "_ci_high", "_p_value")  # beside the difference of two SAEs
SHARE = re.compile(r"(\w+_)?(sel|auc|[pq]_value)")
"""Figures between 0 and 1, or differences of such figures."""
ROUNDING = 1e-6  # tolerance: a share is a sum, and rounding can take it above 1
SHOWN = 60  # maximum length of a name in an error message


def fault(results: Json, sae_level: Any) -> str | None:
    """Return what is wrong with a file's layers or SAE-level figures; None if they are valid."""
    return next(_faults(results, sae_level), None)


def missing(results: Json) -> str | None:
    """Return which figures these layers lack that a report needs; None if they are complete."""
    return next(_missing(results), None)


def is_number(value: Any) -> bool:
    """Return whether a value is a number that is finite as a float; booleans do not count."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _faults(results: Json, sae_level: Any) -> Iterator[str]:
    for layer, found in results.items():
        if not LAYER.fullmatch(layer):
            yield f"{_name(layer)} is no layer"
        elif not isinstance(found, dict):
            yield f"{layer} holds no figures"
        else:
            yield from _of_layer(layer, found)
    yield from _of_level(sae_level)


def _of_layer(layer: str, found: Json) -> Iterator[str]:
    probes = {name: value for name, value in found.items() if isinstance(value, dict)}
    yield from _figures(layer, {name: value for name, value in found.items() if name not in probes})
    for probe, result in probes.items():
        where = f"{layer}, {_name(probe)}"
        if not isinstance(result.get("reason"), str | None):
            yield f"{where}: 'reason' is no text"
        yield from _figures(where, {name: value for name, value in result.items() if name != "reason"})


def _missing(results: Json) -> Iterator[str]:
    for layer, found in results.items():
        probes = {name: value for name, value in found.items() if isinstance(value, dict)}
        needed = OF_A_LAYER if probes else ()
        yield from (f"{layer}: '{name}' is missing" for name in needed if name not in found)
        for probe, result in probes.items():
            if not result.get("reason"):
                absent = [name for name in OF_A_PROBE if not is_number(result.get(name))]
                absent += [name for name in OR_NULL if name not in result]
                yield from (f"{layer}, {_name(probe)}: '{name}' is missing" for name in absent)


def _figures(where: str, found: Json) -> Iterator[str]:
    for name, value in found.items():
        if not (value is None or isinstance(value, bool) or is_number(value)):
            yield f"{where}: {_name(name)} is no number"
        elif SHARE.fullmatch(name) and value is not None and not math.fabs(value) <= 1 + ROUNDING:
            yield f"{where}: {_name(name)} is beyond 1"


def _of_level(level: Any) -> Iterator[str]:
    if not isinstance(level, dict) or not isinstance(level.get("compared"), dict):
        yield "'sae_level' holds no figures"
        return
    yield from _estimates("'sae_level'", {k: v for k, v in level.items() if k not in ("compared", "tasks")}, TESTED[:2])
    yield from _of_tasks("'sae_level'", level.get("tasks", {}))
    for name, found in level["compared"].items():
        where = f"'sae_level', compared with {_name(name)}"
        if isinstance(found, dict):
            yield from (f"{where}: '{key}' is missing" for key in ("delta_sel", "transfer_r2") if key not in found)
            yield from _estimates(where, {k: v for k, v in found.items() if k != "tasks"}, TESTED)
            yield from _of_tasks(where, found.get("tasks", {}))
        else:
            yield f"{where}: no figures"


def _of_tasks(where: str, tasks: Any) -> Iterator[str]:
    where = f"{where}, over tasks"
    families = tasks.get("families", {}) if isinstance(tasks, dict) else None
    if not isinstance(families, dict):
        yield f"{where}: no figures"
        return
    for found in ({k: v for k, v in tasks.items() if k != "families"}, *families.values()):
        if isinstance(found, dict):
            yield from _figures(where, found)
        else:
            yield f"{where}: no figures"


def _estimates(where: str, found: Json, ends: Collection[str]) -> Iterator[str]:
    yield from _figures(where, found)
    for score in ("delta_sel", "transfer_r2"):
        if found.get(score) is not None:
            needed = [f"{score}{end}" for end in ends if not is_number(found.get(f"{score}{end}"))]
            yield from (f"{where}: '{name}' is no number" for name in needed)


def _name(name: str) -> str:
    """Return a name from a file, shortened for an error message."""
    return f"'{name[:SHOWN]}...'" if len(name) > SHOWN else f"'{name}'"
