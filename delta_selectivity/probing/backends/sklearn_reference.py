"""Scikit-learn's logistic regression, one fit at a time: the reference that every backend must agree with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn.linear_model import LogisticRegression

from delta_selectivity.probing.backends.problem import Path, ProbeFits, ProbeProblem, balanced


@dataclass(frozen=True)
class SklearnReference:
    """Solver newton-cholesky in float64 on the CPU: slow, with memory quadratic in d. Sparse features use newton-cg."""

    tolerance: float = 1e-9  # of the largest gradient component of the mean loss
    max_iter: int = 1000
    name: str = field(default="sklearn", init=False)

    def fit(self, problem: ProbeProblem, path: Path | None = None) -> ProbeFits:
        """Fit the probes (see `ProbeBackend`); scikit-learn warns about those that do not converge."""
        fits = ProbeFits.empty(problem)
        x = _on_cpu(problem.x)
        for t in range(problem.n_targets):
            if path is not None:
                path.begin(slice(t, t + 1))
            index = torch.arange(problem.n_splits, device=fits.coef.device) + t * problem.n_splits
            for i, c in enumerate(problem.cs):
                margins = [self._fit_one(problem, x, c, fits, (i, t, s)) for s in range(problem.n_splits)]
                fits.fitted[i, t] = True
                if path is not None:
                    path.record(index, torch.stack(margins))
                    if not bool(path.advance()):
                        break
        return fits

    def _fit_one(
        self, problem: ProbeProblem, x: Any, c: float, fits: ProbeFits, place: tuple[int, int, int]
    ) -> torch.Tensor:
        """Fit one probe, write it into `fits` in the units of x, and return its scores of all rows: float64 [rows]."""
        _, t, s = place
        train = (problem.weight[s] > 0).cpu()
        label = problem.labels[t].cpu()[train]
        weight = balanced(label, problem.weight[s].cpu()[train])
        scale = problem.divisor[s].cpu().numpy()
        is_sparse = scipy.sparse.issparse(x)
        rows = x[train.numpy()]
        centre = np.zeros(len(scale)) if is_sparse else rows.mean(axis=0)
        scaled = rows.multiply(1 / scale).tocsr() if is_sparse else (rows - centre) / scale
        probe = LogisticRegression(
            C=c, solver="newton-cg" if is_sparse else "newton-cholesky", tol=self.tolerance, max_iter=self.max_iter
        ).fit(scaled, label.numpy(), sample_weight=weight.numpy())
        coef = probe.coef_[0] / scale
        fits.coef[place] = torch.from_numpy(coef).to(fits.coef.device)
        fits.intercept[place] = float(probe.intercept_[0]) - float(coef @ centre)
        fits.n_iter[place] = int(probe.n_iter_[0])
        fits.converged[place] = int(probe.n_iter_[0]) < self.max_iter
        return torch.from_numpy(x @ coef).to(fits.coef.device) + fits.intercept[place]


def _on_cpu(x: torch.Tensor) -> Any:
    """Return x [rows, d] in float64: a NumPy array, or SciPy CSR if x is sparse."""
    if not x.is_sparse_csr:
        return x.double().cpu().numpy()
    parts = (x.values().double(), x.col_indices(), x.crow_indices())
    return scipy.sparse.csr_array(tuple(part.cpu().numpy() for part in parts), shape=tuple(x.shape))
