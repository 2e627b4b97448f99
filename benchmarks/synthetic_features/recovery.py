"""Measure how much an SAE keeps of the known features, by five definitions that use no cross-validated probe.

Three definitions use the SAE's output, as the tested scores do. `present`: how well the best linear estimate from the
reconstruction predicts a feature's presence, with equal weights for presence and absence, as in the tasks. `kept`: the
same for the feature's amount in all rows. `held`: how well the amount can be read along the feature's own direction,
which shows whether it is still where the model put it. The field's two definitions, `matched` and `mcc`, use single
latents; they show what a score of the output cannot measure.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sae_lens.synthetic import mean_correlation_coefficient
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.synthetic_features.world import Rows


@dataclass(frozen=True)
class Recovery:
    """Means over features; 1 for the oracle, 0 for an SAE that keeps nothing."""

    present: float  # presence: explained variance of the best linear estimate from x̂, as a share of that from x
    kept: float  # amount: explained variance of the best linear estimate from x̂, as a share of that from x
    kept_tasks: float  # the same over the probed features
    held: float  # amount along the feature's own direction: explained variance in x̂, as a share of that in x
    matched: float  # cosine of the nearest atom x correlation of its latent with the feature's activation
    mcc: float  # mean cosine of atoms and features matched one to one; uses only the decoder


def measure(rows: Rows, recon: Tensor, codes: Tensor, atoms: Tensor, directions: Tensor, features: Tensor) -> Recovery:
    """Measure recon [rows, d], codes [rows, d_sae], atoms [d_sae, d], directions [features, d], features int64 [tasks].

    `features` are the probed ones. MCC is SAE Lens's definition; a feature without an atom counts 0.
    """
    kept = kept_by_feature(rows, recon)
    live = atoms[atoms.norm(dim=1) > 0]
    return Recovery(
        present=present_share(rows, recon),
        kept=float(kept.mean()),
        kept_tasks=float(kept[features].mean()),
        held=float(held_by_feature(rows, recon, directions).mean()),
        matched=float(matched_by_feature(rows, codes, atoms, directions).mean()),
        mcc=mean_correlation_coefficient(live, directions) * min(1.0, len(live) / len(directions)),
    )


def present_share(rows: Rows, recon: Tensor) -> float:
    """Return R² of the features' presence regressed on x̂, summed over features, divided by the same on x; at most 1.

    Both classes of a feature have the same weight. The sums are divided, not the terms, so features that x does not
    predict do not count.
    """
    there = rows.activations > 0
    explained = [sum(_balanced_explained(view, labels) for labels in there.T) for view in (recon, rows.x)]
    return min(float(explained[0] / explained[1]), 1.0)


def _balanced_explained(x: Tensor, labels: Tensor) -> float:
    """Return R² of regressing labels bool [rows] on x [rows, d] with balanced classes, adjusted for chance, at least 0.

    Returns 0 if a class has no row. Weighted rows count as (sum w)² / (sum w²) rows (Kish).
    """
    n_pos = int(labels.sum())
    if n_pos in (0, len(labels)):
        return 0.0
    weight = torch.where(labels, 0.5 / n_pos, 0.5 / (len(labels) - n_pos)).double()
    x = x.double() - weight @ x.double()
    y = labels.double() - 0.5
    inverse = torch.linalg.pinv(x.T @ (x * weight[:, None]), rtol=1e-6, hermitian=True)
    cross = x.T @ (weight * y)
    found = float(cross @ inverse @ cross) / 0.25
    freedom = float(1 / weight.square().sum()) - 1
    left = freedom - int(torch.linalg.matrix_rank(inverse, hermitian=True))
    return max(0.0, 1 - (1 - found) * freedom / left) if left > 0 else 0.0


def kept_by_feature(rows: Rows, recon: Tensor) -> Tensor:
    """Return R² of the activation's linear regression on x̂ divided by that on x, at most 1. [features]

    Any invertible linear map of x has the value 1.
    """
    explained = [_explained(view, rows.activations) for view in (recon, rows.x)]
    return (explained[0] / explained[1]).clamp(max=1)


def _explained(x: Tensor, y: Tensor) -> Tensor:
    """Return R² [columns] of regressing y [rows, columns] on x [rows, d], adjusted for chance, at least 0."""
    x, y = (values.double() - values.double().mean(dim=0) for values in (x, y))
    inverse = torch.linalg.pinv(x.T @ x, rtol=1e-6, hermitian=True)
    cross = x.T @ y
    found = (cross * (inverse @ cross)).sum(dim=0) / y.square().sum(dim=0)
    freedom = len(x) - 1
    return (1 - (1 - found) * freedom / (freedom - torch.linalg.matrix_rank(inverse, hermitian=True))).clamp(min=0)


def held_by_feature(rows: Rows, recon: Tensor, directions: Tensor) -> Tensor:
    """Return R²(activation, recon along the direction) / R²(activation, x along it), at most 1. [features]

    Constants, scales (shrinkage) and changes in other directions have no effect. A negative correlation counts as 0.
    """
    explained = [_correlation(view @ directions.T, rows.activations).clamp(min=0).square() for view in (recon, rows.x)]
    return (explained[0] / explained[1]).clamp(max=1)


def matched_by_feature(rows: Rows, codes: Tensor, atoms: Tensor, directions: Tensor) -> Tensor:
    """Return [features]: cosine of the nearest atom x correlation of that atom's code with the activation."""
    cosine, atom = (normalize(directions, dim=1) @ normalize(atoms, dim=1).T).max(dim=1)
    return (cosine * _correlation(codes[:, atom], rows.activations)).clamp(min=0)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return the correlations of the columns of a and b [rows, columns]; 0 if one is constant. [columns]"""
    a, b = (column - column.mean(dim=0) for column in (a.double(), b.double()))
    scale = a.norm(dim=0) * b.norm(dim=0)
    return torch.where(scale > 1e-9, (a * b).sum(dim=0) / scale.clamp(min=1e-9), torch.zeros_like(scale))
