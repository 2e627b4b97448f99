"""Fit k-sparse probes as sae-probes does, on the folds and rows of this project's probes.

    found = with_k_sparse(out_of_fold(plan, model, recon, backend), latents)
    found.probe(0).views["k5"]                 # [repeats, rows], scores of probes on the five best latents

For each training fold, the k latents are selected whose class means differ most, each latent divided by its mean where
it fires (the default of sae-probes 0.4.2; Kantamneni et al. 2025, arXiv 2502.16681; Gurnee et al. 2023, arXiv
2305.01610). An L2 logistic regression is fitted on them, unscaled. There are three differences from sae-probes, all in
favour of the method. All rows are tested, each by the probe of the fold that holds its group out, instead of one test
split. C is chosen by the out-of-fold loss of all other folds, instead of at most 100 rows. Classes have equal weight,
because the score is balanced accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn.functional import softplus

from delta_selectivity.probing.backends.problem import balanced
from delta_selectivity.probing.c_path import out_of_fold_losses
from delta_selectivity.probing.folds import FoldPlan
from delta_selectivity.probing.probe_statistics import K_SPARSE, quantised
from delta_selectivity.probing.selectivity import FitFacts, OutOfFold

KS = K_SPARSE
CS = (1e-4, 1e-2, 1.0, 1e2, 1e4)
TOLERANCE = 1e-8  # of the Newton decrement
MAX_ITER = 100


@dataclass(frozen=True)
class KSparseFit:
    """Probes on the best latents, for each k, at the C chosen for each fold."""

    scores: NDArray[np.float32]  # [ks, targets, repeats, rows]; positive = the label is predicted
    facts: list[FitFacts]  # [ks]


class BatchedFits(NamedTuple):
    """Logistic regressions, one for each C and split."""

    theta: Tensor  # float64 [cs, splits, k + 1], intercept last
    converged: Tensor  # bool [cs, splits]
    n_iter: list[int]  # for each C, the largest over splits


def with_k_sparse(scores: OutOfFold, latents: Tensor) -> OutOfFold:
    """Return the scores with views `k1` etc. added: k-sparse probes on latents `[rows, d_sae]`, sparse CSR.

    Raises ArithmeticError if a code is too large for a probe.
    """
    fit = k_sparse_fit(scores.plan, latents)
    names = tuple(f"k{k}" for k in KS)
    return replace(
        scores,
        views=(*scores.views, *names),
        scores=np.concatenate([scores.scores, quantised(fit.scores)]),
        fits={**scores.fits, **dict(zip(names, fit.facts, strict=True))},
    )


def k_sparse_fit(plan: FoldPlan, latents: Tensor, ks: Sequence[int] = KS, cs: Sequence[float] = CS) -> KSparseFit:
    """Fit probes on the k best latents of each training split; latents `[rows, d_sae]`, sparse CSR, entries added."""
    parts = (latents.values().double(), latents.col_indices(), latents.crow_indices())
    matrix = csr_array(tuple(part.cpu().numpy() for part in parts), shape=tuple(latents.shape))
    matrix.sum_duplicates()
    shape = (len(ks), len(cs), *plan.labels.shape[:1])
    scores = torch.empty(*shape, *plan.folds.shape, dtype=torch.float64)
    n_unconverged, n_iter = np.zeros((2, len(ks), len(plan.labels)), dtype=np.int64)
    splits_of = np.arange(len(plan.held_out)).reshape(plan.n_repeats, plan.n_folds)
    weight, held_out = plan.training_weight(torch.device("cpu")), torch.from_numpy(plan.held_out)
    for t, labels in enumerate(plan.labels):
        for repeat, splits in enumerate(splits_of):  # one partition at a time, to limit the copies of the rows
            chosen = best_latents(matrix, labels, weight[splits].numpy(), max(ks))
            columns, inverse = np.unique(chosen, return_inverse=True)
            x = torch.from_numpy(matrix[:, columns].toarray())
            place = torch.from_numpy(inverse.reshape(chosen.shape))
            for i, k in enumerate(ks):
                picked = x[:, place[:, :k]].transpose(0, 1)  # [folds, rows, k]
                fit = fit_batched(picked, torch.from_numpy(labels), weight[splits], cs)
                by_fold = decision_scores(picked, fit.theta) * held_out[splits]  # [cs, folds, rows]
                scores[i, :, t, repeat] = by_fold.sum(1)
                n_unconverged[i, t] += int((~fit.converged).sum())
                n_iter[i, t] = max(n_iter[i, t], *fit.n_iter)
    choice = [out_of_fold_losses(plan, of_k).argmin(dim=0) for of_k in scores]  # int64 [targets, repeats, folds] each
    folds = torch.from_numpy(plan.folds.astype(np.int64)).expand(len(plan.labels), -1, -1)
    kept = [of_k.gather(0, c.gather(2, folds)[None])[0] for of_k, c in zip(scores, choice, strict=True)]
    chosen_c = [np.array(cs)[c.numpy()] for c in choice]
    facts = [FitFacts(*of_k) for of_k in zip(chosen_c, n_unconverged, n_iter, strict=True)]
    return KSparseFit(torch.stack(kept).float().numpy(), facts)


def best_latents(
    latents: csr_array, labels: NDArray[np.bool_], weight: NDArray[np.float64], k: int
) -> NDArray[np.intp]:
    """Return [splits, k]: the latents whose normalised class means differ most on each training split, best first.

    latents [rows, d_sae] without duplicate entries; labels bool [rows]; weight [splits, rows], 0 where held out.
    Returns all latents if there are at most k.
    """
    fires = csr_array((latents.data != 0, latents.indices, latents.indptr), latents.shape).astype(np.float64)
    mean_where_fires = _weighted_sums(abs(latents), weight) / (_weighted_sums(fires, weight) + 1e-6)
    by_class = [weight * of_class for of_class in (labels, ~labels)]
    means = [_weighted_sums(latents, w) / w.sum(1, keepdims=True) for w in by_class]
    difference = np.abs(means[0] - means[1]) / (mean_where_fires + 1e-6)
    return np.argsort(-difference, axis=1, kind="stable")[:, :k]


def _weighted_sums(matrix: csr_array, weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return weighted sums over the rows of each split [splits, d_sae]."""
    return np.asarray((matrix.T @ weight.T).T)


def decision_scores(x: Tensor, theta: Tensor) -> Tensor:
    """Return the scores [cs, splits, rows] of x [splits, rows, k] by the probes theta [cs, splits, k + 1]."""
    return torch.einsum("srk,csk->csr", x, theta[..., :-1]) + theta[..., -1:]


def fit_batched(x: Tensor, labels: Tensor, weight: Tensor, cs: Sequence[float]) -> BatchedFits:
    """Fit a separate logistic regression for each split and C, by damped Newton steps.

    x float64 [splits, rows, k], labels bool [rows], weight [splits, rows]. Minimises, as `ProbeProblem` does,
    1/2 |w|^2 + C sum_i v_i log(1 + exp(-y_i f_i)) with v balanced between the classes.
    """
    if not bool(torch.isfinite(x).all()):
        raise ArithmeticError("codes have NaN or Inf")
    x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    v, y = balanced(labels, weight), labels.double() * 2 - 1
    penalty = torch.ones(x.shape[-1], dtype=torch.float64)
    penalty[-1] = 0
    theta = torch.zeros(len(x), x.shape[-1], dtype=torch.float64)
    solutions, converged, n_iter = [], [], []
    for c in cs:
        theta, done, steps = _newton(x, y, c * v, penalty, theta)
        solutions.append(theta)
        converged.append(done)
        n_iter.append(steps)
    return BatchedFits(torch.stack(solutions), torch.stack(converged), n_iter)


def _newton(x: Tensor, y: Tensor, v: Tensor, penalty: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, int]:
    """Minimise from theta [splits, k + 1]; return the minima, which splits converged [splits] and the step count.

    v [splits, rows] includes the factor C.
    """
    loss, converged = _loss(x, y, v, penalty, theta), torch.zeros(len(x), dtype=torch.bool)
    for step_number in range(MAX_ITER):
        p = torch.sigmoid((x @ theta[..., None])[..., 0])
        gradient = penalty * theta + (x.transpose(1, 2) @ (v * (p - (y > 0).double()))[..., None])[..., 0]
        hessian = torch.diag(penalty + 1e-12) + x.transpose(1, 2) @ ((v * p * (1 - p))[..., None] * x)
        step = torch.linalg.solve(hessian, gradient)
        decrement = (step * gradient).sum(1)
        converged = decrement <= TOLERANCE * (1 + loss)
        if bool(converged.all()):
            return theta, converged, step_number
        size = torch.ones_like(loss)
        for _ in range(30):
            there = theta - size[:, None] * step
            new = _loss(x, y, v, penalty, there)
            worse = new > loss - 1e-4 * size * decrement
            if not bool(worse.any()):
                break
            size = torch.where(worse, size / 2, size)
        better = new < loss
        theta, loss = torch.where(better[:, None], there, theta), torch.where(better, new, loss)
    return theta, converged, MAX_ITER


def _loss(x: Tensor, y: Tensor, v: Tensor, penalty: Tensor, theta: Tensor) -> Tensor:
    """Return the objective [splits]."""
    margins = y * (x @ theta[..., None])[..., 0]
    return 0.5 * (penalty * theta.square()).sum(1) + (v * softplus(-margins)).sum(1)
