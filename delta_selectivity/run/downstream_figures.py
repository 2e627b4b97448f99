"""Figures of the model's predictions with x̂ in place of x, from sums by text.

    found = downstream_figures(untouched, with_sae, with_mean, with_zeros, texts)
    found.delta_ce, found.ce_recovered

All in nats. Intervals treat texts as sampled: the sums of each text are one observation, and ratios of sums are
linearised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.probing.uncertainty import Estimate

Floats = NDArray[np.float64]


class TextSums(NamedTuple):
    """Sums over the tokens of each text, float64 ``[texts]``."""

    n: Floats  # counted tokens
    kl: Floats  # KL divergence of the unmodified model's next-token distribution from that of this run
    n_next: Floats  # counted tokens that are followed by a token
    ce: Floats  # cross-entropy of the next token
    n_pos: Floats  # probed tokens
    kl_pos: Floats  # the same three over the probed tokens
    n_next_pos: Floats
    ce_pos: Floats


@dataclass(frozen=True)
class Downstream:
    """Figures of the model with x̂ in place of x, in nats. None: nothing to divide by."""

    ce_model: float | None  # cross-entropy of the next token for the unmodified model
    ce_sae: float | None  # the same with x̂ in place of x
    ce_mean: float | None  # the same with the mean of x in place of x
    ce_zero: float | None  # the same with zeros in place of x
    delta_ce: float | None  # `ce_sae - ce_model`
    delta_ce_ci_low: float | None
    delta_ce_ci_high: float | None
    ce_recovered: float | None  # `(ce_mean - ce_sae) / (ce_mean - ce_model)`; None if mean ablation does no harm
    ce_recovered_ci_low: float | None
    ce_recovered_ci_high: float | None
    kl_sae: float | None  # KL of the model's next-token distribution from that with x̂ in place of x, mean over tokens
    kl_sae_ci_low: float | None
    kl_sae_ci_high: float | None
    kl_mean: float | None  # the same with the mean of x in place of x
    kl_zero: float | None  # the same with zeros in place of x
    kl_pos: float | None  # `kl_sae` at the probed positions only, with x̂ at all tokens; mean over texts
    kl_pos_ci_low: float | None
    kl_pos_ci_high: float | None
    delta_ce_pos: float | None  # `delta_ce` at the probed positions that are followed by a token
    delta_ce_pos_ci_low: float | None
    delta_ce_pos_ci_high: float | None
    n_texts_run: int  # texts used
    n_tokens_run: int  # their tokens


def downstream_figures(
    model: TextSums, sae: TextSums, mean: TextSums, zero: TextSums, texts: NDArray[np.int64]
) -> Downstream:
    """Return the figures from sums by mention; texts, int64 [mentions], is equal for mentions of the same text."""
    _, text = np.unique(texts, return_inverse=True)
    model, sae, mean, zero = (_sum_by_text(sums, text) for sums in (model, sae, mean, zero))
    by_text = np.divide(sae.kl_pos, sae.n_pos, out=np.zeros_like(sae.n_pos), where=sae.n_pos > 0)
    harm = _ratio(mean.ce - model.ce, model.n_next)
    recovered = None if harm is None or harm.low <= 0 else _ratio(mean.ce - sae.ce, mean.ce - model.ce)
    return Downstream(
        ce_model=_value(_ratio(model.ce, model.n_next)),
        ce_sae=_value(_ratio(sae.ce, sae.n_next)),
        ce_mean=_value(_ratio(mean.ce, mean.n_next)),
        ce_zero=_value(_ratio(zero.ce, zero.n_next)),
        **_estimate("delta_ce", _ratio(sae.ce - model.ce, model.n_next)),
        **_estimate("ce_recovered", recovered),
        **_estimate("kl_sae", _ratio(sae.kl, sae.n)),
        kl_mean=_value(_ratio(mean.kl, mean.n)),
        kl_zero=_value(_ratio(zero.kl, zero.n)),
        **_estimate("kl_pos", _ratio(by_text, (sae.n_pos > 0).astype(np.float64))),
        **_estimate("delta_ce_pos", _ratio(sae.ce_pos - model.ce_pos, model.n_next_pos)),
        n_texts_run=len(model.n),
        n_tokens_run=int(model.n.sum()),
    )


def _sum_by_text(sums: TextSums, text: NDArray[np.intp]) -> TextSums:
    """Add up sums by mention to sums by text."""
    return TextSums(*(np.bincount(text, column).astype(np.float64) for column in sums))


def _ratio(above: Floats, below: Floats) -> Estimate | None:
    """Return the ratio of the sums over texts, with its standard error over samples of texts."""
    total, n = below.sum(), len(below)
    if total == 0:
        return None
    value = float(above.sum() / total)
    residuals = above - value * below
    error = np.sqrt(n / (n - 1) * (residuals @ residuals)) / abs(total) if n > 1 else 0.0
    return Estimate(value, float(error), max(n - 1, 1))


def _value(found: Estimate | None) -> float | None:
    return None if found is None else found.value


def _estimate(name: str, found: Estimate | None) -> dict[str, float | None]:
    ends = (None, None) if found is None else (found.low, found.high)
    return {name: _value(found), f"{name}_ci_low": ends[0], f"{name}_ci_high": ends[1]}
