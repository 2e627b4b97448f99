"""k-sparse probing as sae-probes does it, on the folds and rows of this project's probes.

For each training fold the k latents whose class means differ most, each latent divided by its mean where it fires
(sae-probes 0.4.2's default; Kantamneni et al. 2025, arXiv 2502.16681; Gurnee et al. 2023, arXiv 2305.01610), and an
L2 logistic regression on those, unscaled. What differs from sae-probes favours the method: all rows are tested, each by
the probe of the fold that holds its person out, in place of one test split; C is chosen by the out-of-fold
loss of all other folds, in place of at most 100 rows; classes weigh the same, since balanced accuracy is asked for.

    scores = k_sparse_scores(plan, sae.encode(x), ks=(1, 5, 16))     # [ks, targets, repeats, rows]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn.functional import softplus

from delta_selectivity.probing.backends.problem import balanced
from delta_selectivity.probing.folds import FoldPlan
from delta_selectivity.probing.selectivity import choose_c
from delta_selectivity.saes import SparseRows

KS = (1, 5, 16)
CS = (1e-4, 1e-2, 1.0, 1e2, 1e4)
TOLERANCE = 1e-8  # of the Newton decrement
MAX_ITER = 100


def k_sparse_scores(plan: FoldPlan, codes: SparseRows, ks: Sequence[int] = KS) -> NDArray[np.float32]:
    """Out-of-fold scores [ks, targets, repeats, rows] of probes on the k best latents; positive = the label."""
    latents = csr_array(
        (codes.value.double().numpy(), codes.col.numpy(), codes.crow.numpy()), shape=(codes.n_rows, codes.n_cols)
    )
    weight = plan.training_weight(torch.device("cpu"))
    found = torch.empty(len(ks), len(CS), *plan.labels.shape[:1], *plan.folds.shape, dtype=torch.float64)
    for t, labels in enumerate(plan.labels):
        chosen = best_latents(latents, labels, weight.numpy(), max(ks))
        columns, inverse = np.unique(chosen, return_inverse=True)
        x = torch.from_numpy(latents[:, columns].toarray())
        place = torch.from_numpy(inverse.reshape(chosen.shape))
        for i, k in enumerate(ks):
            picked = x[:, place[:, :k]].transpose(0, 1)  # [splits, rows, k]
            theta = fit_side_by_side(picked, torch.from_numpy(labels), weight, CS)
            found[i, :, t] = _held_out_scores(plan, picked, theta)
    choice = [choose_c(plan, scores) for scores in found]  # [targets, repeats, folds] each
    folds = torch.from_numpy(plan.folds.astype(np.int64)).expand(len(plan.labels), -1, -1)
    by_row = [c.gather(2, folds)[None] for c in choice]
    return torch.stack([s.gather(0, row)[0] for s, row in zip(found, by_row, strict=True)]).float().numpy()


def best_latents(
    latents: csr_array, labels: NDArray[np.bool_], weight: NDArray[np.float64], k: int
) -> NDArray[np.intp]:
    """[splits, k]: the latents whose normalised class means differ most on each training split, best first.

    latents [rows, d_sae]; labels bool [rows]; weight [splits, rows], 0 where held out.
    """
    fires = csr_array(
        (np.ones_like(latents.data) * (latents.data != 0), latents.indices, latents.indptr), latents.shape
    )
    training = (weight > 0).astype(np.float64)
    size = abs(latents)
    mean_where_fires = (size.T @ training.T).T / ((fires.T @ training.T).T + 1e-6)
    means = [
        (latents.T @ (training * side).T).T / (training * side).sum(1, keepdims=True) for side in (labels, ~labels)
    ]
    difference = np.abs(means[0] - means[1]) / (mean_where_fires + 1e-6)
    return np.argsort(-difference, axis=1, kind="stable")[:, :k]


def fit_side_by_side(x: Tensor, labels: Tensor, weight: Tensor, cs: Sequence[float]) -> Tensor:
    """theta [cs, splits, k + 1], intercept last: for each split its own logistic regression, by damped Newton.

    x float64 [splits, rows, k], labels bool [rows], weight [splits, rows]. Minimises, as `ProbeProblem` does,
    1/2 |w|^2 + C sum_i v_i log(1 + exp(-y_i f_i)) with v balanced between the classes. Raises RuntimeError if it
    does not converge.
    """
    x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    v, y = balanced(labels, weight), labels.double() * 2 - 1
    penalty = torch.ones(x.shape[-1], dtype=torch.float64)
    penalty[-1] = 0
    theta = torch.zeros(len(x), x.shape[-1], dtype=torch.float64)
    solutions = []
    for c in cs:
        theta = _newton(x, y, c * v, penalty, theta)
        solutions.append(theta)
    return torch.stack(solutions)


def _newton(x: Tensor, y: Tensor, v: Tensor, penalty: Tensor, theta: Tensor) -> Tensor:
    """The minimum for every split from the start theta [splits, k + 1]; v [splits, rows] has C in it."""
    loss = _loss(x, y, v, penalty, theta)
    for _ in range(MAX_ITER):
        p = torch.sigmoid((x @ theta[..., None])[..., 0])
        gradient = penalty * theta + (x.transpose(1, 2) @ (v * (p - (y > 0).double()))[..., None])[..., 0]
        hessian = torch.diag(penalty + 1e-12) + x.transpose(1, 2) @ ((v * p * (1 - p))[..., None] * x)
        step = torch.linalg.solve(hessian, gradient)
        decrement = (step * gradient).sum(1)
        if bool((decrement <= TOLERANCE * (1 + loss)).all()):
            return theta
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
    raise RuntimeError(f"{MAX_ITER} Newton steps were not enough: decrement {decrement.max():.1e}")


def _loss(x: Tensor, y: Tensor, v: Tensor, penalty: Tensor, theta: Tensor) -> Tensor:
    """The objective [splits]."""
    margins = y * (x @ theta[..., None])[..., 0]
    return 0.5 * (penalty * theta.square()).sum(1) + (v * softplus(-margins)).sum(1)


def _held_out_scores(plan: FoldPlan, x: Tensor, theta: Tensor) -> Tensor:
    """[cs, repeats, rows]: each row's score by the split that holds it out; x [splits, rows, k]."""
    scores = torch.einsum("srk,csk->csr", x, theta[..., :-1]) + theta[..., -1:]
    held_out = torch.from_numpy(plan.held_out)
    return (scores * held_out).unflatten(1, (plan.n_repeats, plan.n_folds)).sum(2)
