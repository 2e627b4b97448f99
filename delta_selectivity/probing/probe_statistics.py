"""Statistics of one probe's out-of-fold scores: selectivities, differences, intervals, AUC, bits.

    probe = ProbeScores({"model": ..., "sae": ..., "transfer": ...}, labels, persons, weights, folds)
    statistics(probe).delta_sel

No probes are fitted here, so the statistics of a finished run can be computed again from its stored scores (`scores`).
All intervals come from `uncertainty`: they are clustered by person, corrected for few people and for unequal sizes, and
include the variance due to the choice of folds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.probing.uncertainty import Estimate, balanced_mean, effective_people, estimate_delta

Floats = NDArray[np.floating]

EPSILON = 0.02  # differences of selectivity within +-this count as preserved
MIN_FOR_RETAINED = 0.55  # report the retained share only if the lower end of model_sel's interval is above this
K_SPARSE = (1, 2, 5, 16)  # latents that a k-sparse probe may use; its view is called k1, k2 and so on
K_VIEWS = frozenset(f"k{k}" for k in K_SPARSE)
_TINY = np.float16(6e-8)  # the smallest float16


@dataclass(frozen=True)
class ProbeScores:
    """Scores of rows by probes trained without their person; a positive score predicts the label."""

    views: Mapping[str, NDArray[np.float16]]  # model, sae, transfer, error, ... -> [repeats, rows]
    labels: NDArray[np.bool_]  # [rows]
    persons: NDArray[np.int64]  # [rows], person ids, the same in all datasets
    weights: NDArray[np.float64]  # [rows]
    folds: NDArray[np.int8]  # [repeats, rows], the fold that held the row out
    outliers: NDArray[np.bool_] | None = None  # [rows], rows that `r2_parts` leaves out; None: none
    control_scores: NDArray[np.float16] | None = (
        None  # [rows], scores of probes on `control_labels`, not split by person
    )
    control_labels: NDArray[np.bool_] | None = None  # [rows], random by token type

    @property
    def n_folds(self) -> int:
        """Folds of each partition."""
        return int(self.folds.max()) + 1


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Statistics of one probe in one layer.

    `*_sel` are balanced accuracies (1/2: chance), averaged over the partitions. `*_ci_low` and `*_ci_high` are the ends
    of 95 % intervals. None: the view was not measured, or the figure is undefined here.
    """

    model_sel: float
    model_ci_low: float
    model_ci_high: float
    sae_sel: float
    sae_ci_low: float
    sae_ci_high: float
    delta_sel: float  # sae_sel - model_sel; 0 = preserved, negative = lost
    ci_low: float  # of delta_sel, like the next four
    ci_high: float
    p_value: float  # two-sided, for the hypothesis of no difference
    preserved: bool  # equivalence: the 90 % interval lies within +-epsilon
    detectable: float  # the smallest true difference that is detected with 80 % power
    transfer_sel: float | None = None  # of the model's probes on the SAE's reconstruction
    transfer_delta: float | None = None  # transfer_sel - model_sel
    transfer_ci_low: float | None = None  # of transfer_delta, like the next four
    transfer_ci_high: float | None = None
    transfer_p_value: float | None = None
    transfer_preserved: bool | None = None
    transfer_detectable: float | None = None
    transfer_r2: float | None = None  # share of the variance of the model's probes' scores that x̂ preserves
    transfer_r2_ci_low: float | None = None
    transfer_r2_ci_high: float | None = None
    retained: float | None = None  # (sae_sel - 1/2) / (model_sel - 1/2), where model_ci_low > 0.55
    retained_ci_low: float | None = None
    retained_ci_high: float | None = None
    model_auc: float  # area under the ROC curve; ties count half
    sae_auc: float
    delta_auc: float  # sae_auc - model_auc
    delta_auc_ci_low: float
    delta_auc_ci_high: float
    transfer_auc: float | None = None
    model_bits: float  # 1 - cross-entropy / ln 2, classes balanced; 0: chance
    sae_bits: float
    delta_bits: float  # sae_bits - model_bits
    delta_bits_ci_low: float
    delta_bits_ci_high: float
    transfer_bits: float | None = None
    memorisation: float | None = None  # balanced accuracy on labels random by token type, split by row, minus 1/2
    n_rows: int
    n_people: int  # or other groups of rows
    n_people_effective: float  # number of people of equal size with the same information (Kish)
    n_pos: int  # rows with a positive label
    n_outliers: int  # rows that transfer_r2 leaves out, mostly attention sinks
    error_sel: float | None = None  # of probes on the reconstruction error x - x̂
    error_auc: float | None = None
    error_bits: float | None = None
    latent_sel: float | None = None  # of probes on the SAE's codes
    latent_auc: float | None = None
    latent_bits: float | None = None
    k1_sel: float | None = None  # of probes on the best latent, like the next three; below, on the best 2, 5 and 16
    k1_ci_low: float | None = None
    k1_ci_high: float | None = None
    k1_auc: float | None = None
    k2_sel: float | None = None
    k2_ci_low: float | None = None
    k2_ci_high: float | None = None
    k2_auc: float | None = None
    k5_sel: float | None = None
    k5_ci_low: float | None = None
    k5_ci_high: float | None = None
    k5_auc: float | None = None
    k16_sel: float | None = None
    k16_ci_low: float | None = None
    k16_ci_high: float | None = None
    k16_auc: float | None = None


def quantised(scores: Floats) -> NDArray[np.float16]:
    """Return scores as float16 for storage: signs are preserved, and overflow becomes the largest float16."""
    largest = float(np.finfo(np.float16).max)
    kept = np.clip(scores, -largest, largest).astype(np.float16)
    return np.where((kept == 0) & (scores != 0), np.copysign(_TINY, scores).astype(np.float16), kept)


def correct(probe: ProbeScores, view: str) -> NDArray[np.float64]:
    """Return 1 where the view's probe classifies a held-out row correctly, else 0: [repeats, rows]."""
    return ((probe.views[view] > 0) == probe.labels).astype(np.float64)


def bits(probe: ProbeScores, view: str) -> NDArray[np.float64]:
    """Return each row's information about its label in bits: 1 - log loss / ln 2, [repeats, rows]."""
    scores = probe.views[view].astype(np.float64)
    return 1 - np.logaddexp(0, np.where(probe.labels, -scores, scores)) / np.log(2)


def r2_parts(probe: ProbeScores, view: str) -> NDArray[np.float64]:
    """Return row values [repeats, rows] whose balanced mean is the R² of a view's scores against the model's.

    R² is 1 - (squared difference) / (variance of the model's scores), with balanced classes. For the view "transfer" it
    is the share of the variance of the model probes' scores on x that remains on x̂. Scores are compared with scores,
    not with labels, so label noise does not enter. The ratio is linearised, which gives each row's influence on it.

    Outliers are left out: one attention sink among 5000 rows had most of the variance (docs/reliability.md). They get
    the balanced mean itself, so their influence is 0, and the other rows of their class are reweighted.
    """
    model, copy = probe.views["model"].astype(np.float64), probe.views[view].astype(np.float64)
    counted = _without_outliers(probe)

    def mean(values: Floats) -> Floats:
        return balanced_mean(values[:, counted], probe.labels[counted], probe.weights[counted])[:, None]

    variance, error = (model - mean(model)) ** 2, (copy - model) ** 2
    spread = np.maximum(mean(variance), np.finfo(np.float64).tiny)  # 0 for a probe with constant scores
    unexplained = mean(error) / spread
    influence = np.where(counted, (unexplained * variance - error) / spread, 0.0)
    for label in (False, True):
        of_class = probe.labels == label
        influence[:, of_class] *= probe.weights[of_class].sum() / probe.weights[of_class & counted].sum()
    return np.asarray(1 - unexplained + influence)


def _without_outliers(probe: ProbeScores) -> NDArray[np.bool_]:
    """Return a mask [rows] of rows that are not outliers; all rows if a class would be left empty."""
    everything = np.ones(len(probe.labels), dtype=bool)
    if probe.outliers is None:
        return everything
    counted = ~probe.outliers
    return counted if len(np.unique(probe.labels[counted])) == 2 else everything


def auc_parts(probe: ProbeScores, view: str) -> NDArray[np.float64]:
    """Return row values [repeats, rows] whose balanced mean is the AUC, with DeLong's influence function.

    A row's placement V is the share of the other class that it is ranked correctly against (ties count half). AUC is
    the mean of V over either class. 2 V - AUC has the balanced mean AUC and varies by row as the AUC's influence
    function (DeLong, DeLong & Clarke-Pearson 1988), so the clustered interval of its mean is that of the AUC.
    """
    return np.stack([_auc_parts(scores, probe.labels, probe.weights) for scores in probe.views[view]])


def _auc_parts(scores: Floats, labels: NDArray[np.bool_], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    scores = scores.astype(np.float32)  # float16 is sorted many times slower
    placement = np.empty(len(scores))
    for label in (False, True):
        other = labels != label
        order = np.argsort(scores[other])
        ranked = scores[other][order]
        below = np.concatenate([[0.0], np.cumsum(weights[other][order])]) / weights[other].sum()
        own = scores[labels == label]
        share = (below[np.searchsorted(ranked, own, "left")] + below[np.searchsorted(ranked, own, "right")]) / 2
        placement[labels == label] = share if label else 1 - share
    return 2 * placement - float(balanced_mean(placement, labels, weights))


def statistics(probe: ProbeScores, epsilon: float = EPSILON) -> Statistics:
    """Return all statistics of the scores; differences within +-epsilon count as preserved."""

    def estimate(values: Floats, level_varies: bool = False) -> Estimate:
        return estimate_delta(values, probe.labels, probe.persons, probe.weights, probe.n_folds, level_varies)

    dense = [view for view in probe.views if view not in K_VIEWS]
    right = {view: correct(probe, view) for view in dense}
    model, sae = estimate(right["model"] - 0.5), estimate(right["sae"] - 0.5)
    delta = estimate(right["sae"] - right["model"])
    return Statistics(
        model_sel=_mean(probe, right["model"]),
        model_ci_low=model.low + 0.5,
        model_ci_high=model.high + 0.5,
        sae_sel=_mean(probe, right["sae"]),
        sae_ci_low=sae.low + 0.5,
        sae_ci_high=sae.high + 0.5,
        **_difference("delta_sel", "", delta, epsilon),
        **_transfer(probe, right, estimate, epsilon),
        **_retained(model, sae, right, estimate),
        **_change(probe, "auc", {view: auc_parts(probe, view) for view in dense}, estimate),
        **_change(probe, "bits", {view: bits(probe, view) for view in dense}, estimate),
        memorisation=_memorisation(probe),
        n_rows=len(probe.labels),
        n_people=len(np.unique(probe.persons)),
        n_people_effective=effective_people(probe.persons, probe.weights),
        n_pos=int(probe.labels.sum()),
        n_outliers=0 if probe.outliers is None else int(probe.outliers.sum()),
        error_sel=_mean(probe, right["error"]) if "error" in right else None,
        latent_sel=_mean(probe, right["latents"]) if "latents" in right else None,
        **_k_sparse(probe, estimate),
    )


def _mean(probe: ProbeScores, values: Floats) -> float:
    """Return the balanced mean over rows, averaged over the partitions."""
    return float(balanced_mean(values, probe.labels, probe.weights).mean())


def _difference(name: str, prefix: str, delta: Estimate, epsilon: float) -> dict[str, Any]:
    return {
        name: delta.value,
        f"{prefix}ci_low": delta.low,
        f"{prefix}ci_high": delta.high,
        f"{prefix}p_value": delta.p_value,
        f"{prefix}preserved": delta.within(epsilon),
        f"{prefix}detectable": delta.detectable,
    }


def _transfer(probe: ProbeScores, right: Mapping[str, Floats], estimate: Any, epsilon: float) -> dict[str, Any]:
    """Return the statistics of the model's probes on x̂; empty if the view was not measured."""
    if "transfer" not in right:
        return {}
    delta = estimate(right["transfer"] - right["model"])
    share = estimate(r2_parts(probe, "transfer"), level_varies=True)
    return {
        "transfer_sel": _mean(probe, right["transfer"]),
        **_difference("transfer_delta", "transfer_", delta, epsilon),
        "transfer_r2": share.value,
        "transfer_r2_ci_low": share.low,
        "transfer_r2_ci_high": share.high,
    }


def _retained(model: Estimate, sae: Estimate, right: Mapping[str, Floats], estimate: Any) -> dict[str, Any]:
    """Return the retained share, with the delta-method interval: that of (sae - share x model) / (model - 1/2)."""
    if model.low + 0.5 <= MIN_FOR_RETAINED:
        return {}
    share = sae.value / model.value
    spread: Estimate = estimate(((right["sae"] - 0.5) - share * (right["model"] - 0.5)) / model.value)
    return {
        "retained": share,
        "retained_ci_low": share + spread.low - spread.value,
        "retained_ci_high": share + spread.high - spread.value,
    }


def _change(probe: ProbeScores, score: str, values: Mapping[str, Floats], estimate: Any) -> dict[str, Any]:
    """Return the score of each view, and the SAE's difference from the model with its interval."""
    delta: Estimate = estimate(values["sae"] - values["model"])
    by_view = {name: _mean(probe, values[name]) for name in values}
    return {
        f"model_{score}": by_view["model"],
        f"sae_{score}": by_view["sae"],
        f"delta_{score}": delta.value,
        f"delta_{score}_ci_low": delta.low,
        f"delta_{score}_ci_high": delta.high,
        f"transfer_{score}": by_view.get("transfer"),
        f"error_{score}": by_view.get("error"),
        f"latent_{score}": by_view.get("latents"),
    }


def _k_sparse(probe: ProbeScores, estimate: Any) -> dict[str, Any]:
    """Return the statistics of the k-sparse probes; empty if there are none."""
    known: dict[str, Any] = {}
    for view in K_VIEWS & probe.views.keys():
        right = correct(probe, view)
        chance: Estimate = estimate(right - 0.5)
        known |= {f"{view}_sel": _mean(probe, right), f"{view}_auc": _mean(probe, auc_parts(probe, view))}
        known |= {f"{view}_ci_low": chance.low + 0.5, f"{view}_ci_high": chance.high + 0.5}
    return known


def _memorisation(probe: ProbeScores) -> float | None:
    if probe.control_scores is None or probe.control_labels is None:
        return None
    right = (probe.control_scores > 0) == probe.control_labels
    return float(balanced_mean(right.astype(np.float64), probe.control_labels, probe.weights)) - 0.5
