"""Scikit-learn's logistic regression, one fit at a time: the reference that every backend must agree with."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn.linear_model import LogisticRegression

from delta_selectivity.probing.backends.problem import ProbeFits, ProbeProblem, balanced


@dataclass(frozen=True)
class SklearnReference:
    """Solver newton-cholesky in float64 on the CPU: slow, with memory quadratic in d. Sparse features use newton-cg."""

    tolerance: float = 1e-9  # of the largest gradient component of the mean loss
    max_iter: int = 1000
    name: str = field(default="sklearn", init=False)

    def fit(self, problem: ProbeProblem) -> ProbeFits:
        """Fit all probes of the problem; scikit-learn warns about those that do not converge."""
        fits = ProbeFits.empty(problem)
        x = _on_cpu(problem.x)
        solver = "newton-cg" if scipy.sparse.issparse(x) else "newton-cholesky"
        for t, s in product(range(problem.n_targets), range(problem.n_splits)):
            train = (problem.weight[s] > 0).cpu()
            label = problem.labels[t].cpu()[train]
            weight = balanced(label, problem.weight[s].cpu()[train])
            scale = problem.divisor[s].cpu().numpy()
            rows = x[train.numpy()]
            centre = np.zeros(len(scale)) if scipy.sparse.issparse(x) else rows.mean(axis=0)
            scaled = rows.multiply(1 / scale).tocsr() if scipy.sparse.issparse(x) else (rows - centre) / scale
            for i, c in enumerate(problem.cs):
                probe = LogisticRegression(C=c, solver=solver, tol=self.tolerance, max_iter=self.max_iter).fit(
                    scaled, label.numpy(), sample_weight=weight.numpy()
                )
                coef = probe.coef_[0] / scale
                fits.coef[i, t, s] = torch.from_numpy(coef).to(fits.coef.device)
                fits.intercept[i, t, s] = float(probe.intercept_[0]) - float(coef @ centre)
                fits.n_iter[i, t, s] = int(probe.n_iter_[0])
                fits.converged[i, t, s] = int(probe.n_iter_[0]) < self.max_iter
        return fits


def _on_cpu(x: torch.Tensor) -> Any:
    """Return x [rows, d] in float64: a NumPy array, or SciPy CSR if x is sparse."""
    if not x.is_sparse_csr:
        return x.double().cpu().numpy()
    parts = (x.values().double(), x.col_indices(), x.crow_indices())
    return scipy.sparse.csr_array(tuple(part.cpu().numpy() for part in parts), shape=tuple(x.shape))
