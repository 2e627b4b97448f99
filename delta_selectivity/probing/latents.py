"""Attribution of a model probe to SAE latents: each latent's share of the gap between the class means.

    found = carriers(w, x, recon, codes, directions, fired, labels, weights)
    found.share[0], found.latents[0]             # the largest share of the gap, and its latent

A probe with weights w separates the classes by the gap w · (mean of x over class 1 - mean over class 0). x is the sum
of the SAE's reconstruction and its error, and the reconstruction is a sum over latents, so the gap is a sum too: latent
j contributes (w · W_dec[j]) (mean of z_j over class 1 - over class 0), and the error contributes the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

Floats = NDArray[np.float64]
KEPT = 20  # latents kept from each of three rankings


@dataclass(frozen=True)
class Carriers:
    """Latents of one cell; arrays are [latents], the largest share (of `share` or `dropped`) first."""

    gap: float  # difference between the classes' mean scores by the model's probe
    latents: NDArray[np.int64]  # their indices
    share: Floats  # share of the gap that the latent carries
    dropped: Floats  # share of the gap in the error along the latent's direction: what it would carry if it fired
    alignment: Floats  # w · W_dec[j]
    difference: Floats  # difference between the latent's class means
    rate: Floats  # [2, latents], share of rows of class 0 and of class 1 in which it fires
    auc: Floats  # AUC of the latent alone
    others: float  # share that all other latents carry together
    error: float  # share that no latent carries
    rest: float  # share of row-dependent biases and scales; about 0 for most SAEs


def carriers(
    w: Tensor,
    x: Tensor,
    recon: Tensor,
    codes: Tensor,
    directions: Tensor,
    fired: Tensor,
    labels: NDArray[np.bool_],
    weights: Floats,
    kept: int = KEPT,
) -> Carriers:
    """Return the latents that contribute most, those that were dropped, and those that best separate the classes.

    Args:
        w: The probe's weights on x, float64 `[d]`.
        x: Activations `[rows, d]`.
        recon: Their reconstructions `[rows, d]`.
        codes: Sparse CSR `[rows, d_sae]`.
        directions: Decoder directions of latents, `[latents, d]`.
        fired: Indices of those latents, int64 `[latents]`, ascending; must include all that are non-zero in some row.
        labels: `[rows]`.
        weights: `[rows]`.
        kept: How many latents to keep from each of the three rankings.
    """
    w, directions = w.double().cpu(), directions.double().cpu()
    means = _class_means(labels, weights)  # [2, rows]
    gaps = [float((means[1] - means[0]) @ (part.double().cpu() @ w).numpy()) for part in (x, recon, x - recon)]
    z = _columns(codes, fired)
    of_class = np.stack([(z.T @ mean) for mean in means])  # [2, latents]
    squares = np.stack([(z.multiply(z).T @ mean) for mean in means])
    difference = of_class[1] - of_class[0]
    alignment = (directions @ w).numpy()
    contribution = alignment * difference
    error = (torch.from_numpy(means[1] - means[0]) @ (x - recon).double().cpu()).numpy()  # [d]
    norm = np.maximum((directions**2).sum(dim=1).numpy(), np.finfo(np.float64).tiny)
    dropped = alignment * (directions.numpy() @ error) / norm
    gap = gaps[0] if gaps[0] != 0 else np.finfo(np.float64).tiny
    spread = np.sqrt(np.maximum(squares - of_class**2, 0).sum(axis=0)) + 1e-12
    orders = (np.abs(contribution), np.abs(dropped), np.abs(difference) / spread)
    chosen = np.unique(np.concatenate([np.argsort(-values, kind="stable")[:kept] for values in orders]))
    chosen = chosen[np.argsort(-np.maximum(np.abs(contribution), np.abs(dropped))[chosen], kind="stable")]
    rate = np.stack([((z != 0).T @ mean) for mean in means])
    dense = z[:, chosen].toarray()
    return Carriers(
        gap=gaps[0],
        latents=fired.cpu().numpy()[chosen],
        share=contribution[chosen] / gap,
        dropped=dropped[chosen] / gap,
        alignment=alignment[chosen],
        difference=difference[chosen],
        rate=rate[:, chosen],
        auc=np.array([_auc(values, labels, weights) for values in dense.T]),
        others=float(contribution.sum() - contribution[chosen].sum()) / gap,
        error=gaps[2] / gap,
        rest=(gaps[1] - float(contribution.sum())) / gap,
    )


def _class_means(labels: NDArray[np.bool_], weights: Floats) -> Floats:
    """Return each row's weight in the mean of its class: float64 [2, rows]."""
    members = np.stack([np.where(labels == label, weights, 0.0) for label in (False, True)])
    return np.asarray(members / members.sum(axis=1, keepdims=True))


def _columns(codes: Tensor, fired: Tensor) -> sparse.csc_matrix:
    """Return the columns of these latents, with duplicate entries added."""
    parts = (codes.values(), codes.col_indices(), codes.crow_indices())
    values, col, crow = (part.cpu().numpy() for part in parts)
    matrix = sparse.csr_matrix((values.astype(np.float64), col, crow), shape=tuple(codes.shape))
    matrix.sum_duplicates()
    return matrix.tocsc()[:, fired.cpu().numpy()]


def _auc(values: Floats, labels: NDArray[np.bool_], weights: Floats) -> float:
    """Return the area under the ROC curve; ties count half."""
    levels, place = np.unique(values, return_inverse=True)
    by_class = [np.bincount(place, np.where(labels == label, weights, 0.0), len(levels)) for label in (False, True)]
    below = np.cumsum(by_class[0]) - by_class[0] / 2
    return float((below * by_class[1]).sum() / (by_class[0].sum() * by_class[1].sum()))
