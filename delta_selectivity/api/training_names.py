"""Names under which training loggers log an evaluator's numbers.

for_training(evaluator(sae), 3, "resid_post")     # {"delta/gender/layer_3/transfer_r2": 0.71, ...}
"""

from __future__ import annotations

from collections.abc import Mapping

ROOT = "delta"
"""First part of every name, by which loggers group metrics."""
SCORES = ("transfer_r2", "delta_sel", "sae_sel", "model_sel")
FIGURES = ("fvu_pos", "fvu_whole", "mse_whole", "cosine", "l0", "dead")
LOW, HIGH = "_ci_low", "_ci_high"
"""Suffixes of the names of an interval's bounds."""

_WITH_SCORE = {
    "ci_low": f"delta_sel{LOW}",
    "ci_high": f"delta_sel{HIGH}",
    **{f"{view}{end}": f"{view}_sel{end}" for view in ("model", "sae") for end in (LOW, HIGH)},
}
"""Interval bounds whose names in a record lack the score's name."""


def for_training(numbers: Mapping[str, float], layer: int, hookpoint: str) -> dict[str, float]:
    """Return the numbers to log during training, selected from the flat dict of an evaluator.

    Names are ``delta/TASK/PROBE/layer_N/SCORE`` (without ``PROBE/`` if it has the task's name), and
    ``delta/layer_N/SCORE`` for means over all tasks; for hook points other than resid_post, ``layer_N_HOOKPOINT``.
    Bounds of intervals end in ``_ci_low`` and ``_ci_high``.

    Example:
        >>> for_training({"transfer_r2": 0.7, "gender/ci_low": -0.1, "gender/n_iter": 9.0}, 3, "mlp_out")
        {'delta/layer_3_mlp_out/transfer_r2': 0.7, 'delta/gender/layer_3_mlp_out/delta_sel_ci_low': -0.1}
    """
    place = f"layer_{layer}" if hookpoint == "resid_post" else f"layer_{layer}_{hookpoint}"
    selected: dict[str, float] = {}
    for name, value in numbers.items():
        task, _, last = name.rpartition("/")
        last = _WITH_SCORE.get(last, last)
        if last.removesuffix(LOW).removesuffix(HIGH) in (*SCORES, *FIGURES):
            selected["/".join(part for part in (ROOT, task, place, last) if part)] = value
    return selected


def intervals(names: Mapping[str, float]) -> list[str]:
    """Return the names of the numbers that have both interval bounds."""
    return [name for name in names if {f"{name}{LOW}", f"{name}{HIGH}"} <= names.keys()]
