"""Scikit-learn's logistic regression, one fit at a time: the reference that every backend must agree with."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

import torch
from sklearn.linear_model import LogisticRegression

from probe_backends.problem import ProbeFits, ProbeProblem, balanced


@dataclass(frozen=True)
class SklearnReference:
    """newton-cholesky in float64 on the CPU; slow, and quadratic in d for memory."""

    tolerance: float = 1e-9  # of the largest gradient component of the mean loss
    max_iter: int = 1000
    name: str = field(default="sklearn", init=False)

    def fit(self, problem: ProbeProblem) -> ProbeFits:
        """All probes of the problem; scikit-learn warns, and `converged` tells, where one did not converge."""
        fits = ProbeFits.empty(problem)
        x = problem.x.double().cpu()
        for t, s in product(range(problem.n_targets), range(problem.n_splits)):
            train = (problem.weight[s] > 0).cpu()
            label = problem.labels[t].cpu()[train]
            weight = balanced(label, problem.weight[s].cpu()[train])
            scale = problem.divisor[s].cpu()
            centre = x[train].mean(dim=0)
            scaled = ((x[train] - centre) / scale).numpy()
            for i, c in enumerate(problem.cs):
                probe = LogisticRegression(
                    C=c, solver="newton-cholesky", tol=self.tolerance, max_iter=self.max_iter
                ).fit(scaled, label.numpy(), sample_weight=weight.numpy())
                coef = torch.from_numpy(probe.coef_[0]) / scale
                fits.coef[i, t, s] = coef.to(fits.coef.device)
                fits.intercept[i, t, s] = float(probe.intercept_[0]) - float(coef @ centre)
                fits.n_iter[i, t, s] = int(probe.n_iter_[0])
                fits.converged[i, t, s] = int(probe.n_iter_[0]) < self.max_iter
        return fits
