"""Names of an evaluator's numbers for the loggers of a training.

for_training(evaluator(sae), 3, "resid_post")     # {"delta/gender/layer_3/transfer_r2": 0.71, ...}
"""

from __future__ import annotations

from collections.abc import Mapping

ROOT = "delta"
"""First part of every name: loggers group by it."""
SCORES = ("transfer_r2", "delta_sel", "sae_sel", "model_sel")
FIGURES = ("fvu_pos", "fvu_whole", "mse_whole", "cosine", "l0", "dead")
LOW, HIGH = "_ci_low", "_ci_high"
"""Endings of the names of an interval's bounds."""

_WITH_SCORE = {
    "ci_low": f"delta_sel{LOW}",
    "ci_high": f"delta_sel{HIGH}",
    **{f"{view}{end}": f"{view}_sel{end}" for view in ("model", "sae") for end in (LOW, HIGH)},
}
"""Bounds of intervals that a record names without their score."""


def for_training(numbers: Mapping[str, float], layer: int, hookpoint: str) -> dict[str, float]:
    """Return what a training is watched by, of the flat dict of an evaluator.

    Names are ``delta/TASK/PROBE/layer_N/SCORE`` (without ``PROBE/`` where it has the task's name), those of the means
    over all tasks ``delta/layer_N/SCORE``; at other places than resid_post ``layer_N_PLACE``. An interval's bounds end
    in ``_ci_low`` and ``_ci_high``.

    Example:
        >>> for_training({"transfer_r2": 0.7, "gender/ci_low": -0.1, "gender/n_iter": 9.0}, 3, "mlp_out")
        {'delta/layer_3_mlp_out/transfer_r2': 0.7, 'delta/gender/layer_3_mlp_out/delta_sel_ci_low': -0.1}
    """
    place = f"layer_{layer}" if hookpoint == "resid_post" else f"layer_{layer}_{hookpoint}"
    found: dict[str, float] = {}
    for name, value in numbers.items():
        of, _, last = name.rpartition("/")
        last = _WITH_SCORE.get(last, last)
        if last.removesuffix(LOW).removesuffix(HIGH) in (*SCORES, *FIGURES):
            found["/".join(part for part in (ROOT, of, place, last) if part)] = value
    return found


def intervals(names: Mapping[str, float]) -> list[str]:
    """Return the names of numbers that have both bounds of an interval beside them."""
    return [name for name in names if {f"{name}{LOW}", f"{name}{HIGH}"} <= names.keys()]
