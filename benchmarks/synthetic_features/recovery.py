"""What an SAE truly keeps of the known features, by four definitions, none of which is a probe's.

Two are about what the SAE puts out, as the scores under test are. `kept` asks whether a feature's activation can be
read off the reconstruction, by the best linear estimate there is: is it still there? `held` asks whether it can be
read along the feature's own direction: is it still where the model put it? The field's two, `matched` and `mcc`, are
about single latents; they are here to show what a score of the output cannot know.
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

    kept: float  # of what the best linear estimate from x tells of each feature, the share that the one from x̂ tells
    kept_tasks: float  # the same over the features that are probed for
    held: float  # of what x tells of each feature along its own direction, the share that x̂ tells
    matched: float  # cosine of the nearest atom x correlation of its latent with the feature's activation
    mcc: float  # cosines of atoms and features matched one to one; the decoder alone


def measure(rows: Rows, recon: Tensor, codes: Tensor, atoms: Tensor, directions: Tensor, features: Tensor) -> Recovery:
    """recon [rows, d], codes [rows, d_sae], atoms [d_sae, d], directions [features, d], features int64 [tasks].

    `features` are those that are probed for. MCC is SAE Lens's; a feature that is left without an atom counts 0.
    """
    kept = kept_by_feature(rows, recon)
    live = atoms[atoms.norm(dim=1) > 0]
    return Recovery(
        kept=float(kept.mean()),
        kept_tasks=float(kept[features].mean()),
        held=float(held_by_feature(rows, recon, directions).mean()),
        matched=float(matched_by_feature(rows, codes, atoms, directions).mean()),
        mcc=mean_correlation_coefficient(live, directions) * min(1.0, len(live) / len(directions)),
    )


def kept_by_feature(rows: Rows, recon: Tensor) -> Tensor:
    """R² of the activation's linear regression on x̂ / that on x, at most 1. [features]

    Any invertible linear map of x keeps everything.
    """
    told = [_explained(view, rows.activations) for view in (recon, rows.x)]
    return (told[0] / told[1]).clamp(max=1)


def _explained(x: Tensor, y: Tensor) -> Tensor:
    """R² of regressing each column of y [rows, columns] on x [rows, d], adjusted for chance, at least 0. [columns]"""
    x, y = (values.double() - values.double().mean(dim=0) for values in (x, y))
    inverse = torch.linalg.pinv(x.T @ x, rtol=1e-6, hermitian=True)
    cross = x.T @ y
    found = (cross * (inverse @ cross)).sum(dim=0) / y.square().sum(dim=0)
    freedom = len(x) - 1
    return (1 - (1 - found) * freedom / (freedom - torch.linalg.matrix_rank(inverse, hermitian=True))).clamp(min=0)


def held_by_feature(rows: Rows, recon: Tensor, directions: Tensor) -> Tensor:
    """R²(activation, recon along the direction) / R²(activation, x along it), at most 1. [features]

    A constant, a scale (shrinkage) and what goes on in other directions do not count. A negative correlation is 0.
    """
    told = [_correlation(view @ directions.T, rows.activations).clamp(min=0).square() for view in (recon, rows.x)]
    return (told[0] / told[1]).clamp(max=1)


def matched_by_feature(rows: Rows, codes: Tensor, atoms: Tensor, directions: Tensor) -> Tensor:
    """The cosine of a feature's nearest atom x the correlation of that atom's code with the activation. [features]"""
    cosine, atom = (normalize(directions, dim=1) @ normalize(atoms, dim=1).T).max(dim=1)
    return (cosine * _correlation(codes[:, atom], rows.activations)).clamp(min=0)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Of the columns of a and b [rows, columns]; 0 where one is constant. [columns]"""
    a, b = (column - column.mean(dim=0) for column in (a.double(), b.double()))
    scale = a.norm(dim=0) * b.norm(dim=0)
    return torch.where(scale > 1e-9, (a * b).sum(dim=0) / scale.clamp(min=1e-9), torch.zeros_like(scale))
