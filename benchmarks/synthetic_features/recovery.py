"""What an SAE truly keeps of the known features, by three definitions, none of which fits a probe.

`held` is the one that the benchmark ranks by, because it is about what the SAE puts out, as delta_sel is, and asks
the world alone: how much of a feature's activation does its own direction still tell? `matched` and `mcc` are the
field's, about single latents; they are beside it to show what a score of the output cannot know.
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

    held: float  # of what x tells of each feature along its direction, the share that x̂ tells
    held_tasks: float  # the same over the features that are probed for
    matched: float  # cosine of the nearest atom x correlation of its latent with the feature's activation
    mcc: float  # cosines of atoms and features matched one to one; the decoder alone


def measure(rows: Rows, recon: Tensor, codes: Tensor, atoms: Tensor, directions: Tensor, features: Tensor) -> Recovery:
    """recon [rows, d], codes [rows, d_sae], atoms [d_sae, d], directions [features, d], features int64 [tasks].

    `features` are those that are probed for. MCC is SAE Lens's; a feature that is left without an atom counts 0.
    """
    held = held_by_feature(rows, recon, directions)
    live = atoms[atoms.norm(dim=1) > 0]
    return Recovery(
        held=float(held.mean()),
        held_tasks=float(held[features].mean()),
        matched=float(matched_by_feature(rows, codes, atoms, directions).mean()),
        mcc=mean_correlation_coefficient(live, directions) * min(1.0, len(live) / len(directions)),
    )


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
