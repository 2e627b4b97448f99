"""Strided features for the batched solver: one matrix for all columns, an iteration is two large GEMMs.

Held-out rows have weight 0, so the matrix is the same for all columns. The preconditioner is the inverse of the
Hessian at the start of a C, averaged over the columns; where columns are few, the Hessian at zero (Böhning 1992's
bound) shrunk to the mean curvature, since building another costs as much as d / (2 columns) iterations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probe_backends.lbfgs import Loss, dot
from probe_backends.problem import ProbeProblem

_TEMPORARIES = 10  # float64 matrices [columns, rows] alive at once
_GRAM_PAYS = 12  # a Hessian is built anew for each C up to this many features a column


@dataclass(frozen=True)
class DenseDesign:
    """The features of a problem, centred and in units between the splits' scales."""

    z: Tensor  # float64 [rows, d + 1], the last column is 1
    unit: Tensor  # float64 [d]; z = (x - centre) / unit
    centre: Tensor  # float64 [d]
    divisor: Tensor  # float64 [splits, d]

    @classmethod
    def build(cls, problem: ProbeProblem) -> DenseDesign:
        """A float64 copy of the problem's x, on its device."""
        rows, d = problem.x.shape
        divisor = problem.divisor.to(problem.x.device)
        unit = divisor.log().mean(dim=0).exp()
        centre = problem.x.double().mean(dim=0)
        z = torch.ones(rows, d + 1, dtype=torch.float64, device=problem.x.device)
        z[:, :d] = (problem.x - centre) / unit
        return cls(z, unit, centre, divisor)

    @property
    def column_bytes(self) -> int:
        """Of a column's temporaries."""
        return 8 * _TEMPORARIES * max(len(self.z), 1)

    def start(self, n_columns: int) -> Tensor:
        """Theta [columns, d + 1] where the smallest C starts: zeros."""
        return self.z.new_zeros(n_columns, self.z.shape[1])

    def columns(self, index: Tensor, split: Tensor, loss: Loss) -> DenseColumns:
        """Regressions with these indices, splits (both int64 [columns]) and losses."""
        ones = torch.ones(len(index), 1, dtype=self.z.dtype, device=self.z.device)
        penalty = torch.ones(self.z.shape[1], dtype=self.z.dtype, device=self.z.device)
        penalty[-1] = 0
        stretch = torch.cat([self.unit / self.divisor[split], ones], dim=1)
        return DenseColumns(index, loss, self, stretch, penalty)

    def preconditioners(self, n_columns: int) -> InverseHessians:
        """For so many columns, along C."""
        return InverseHessians(self.z, n_columns)


@dataclass(frozen=True)
class DenseColumns:
    """Theta [columns, d + 1] has the intercept last.

    Features are z times `stretch`, so each column sees x by the scale of its own split.
    """

    index: Tensor  # int64 [columns]
    loss: Loss
    design: DenseDesign
    stretch: Tensor  # [columns, d + 1]
    penalty: Tensor  # [d + 1], 1 but 0 for the intercept

    def margins(self, theta: Tensor) -> Tensor:
        return (theta * self.stretch) @ self.design.z.T

    def gradients(self, theta: Tensor, residual: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        gradient = (residual @ self.design.z).mul_(self.stretch).add_(theta * self.penalty)
        return gradient, gradient @ inverse

    def along(self, theta: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        penalised = self.penalty * direction
        return self.margins(direction), dot(penalised, theta), dot(penalised, direction)

    def lengths(self, theta: Tensor, margins: Tensor, gradient: Tensor, newton: Tensor) -> tuple[Tensor, Tensor]:
        return newton.norm(dim=1), theta[:, :-1].norm(dim=1)

    def coefficients(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        raw = theta * self.stretch
        coef = raw[:, :-1] / self.design.unit
        return coef, raw[:, -1] - coef @ self.design.centre


class InverseHessians:
    """The inverse Hessian [d + 1, d + 1] of the objective for stretch 1, along C."""

    def __init__(self, z: Tensor, n_columns: int) -> None:
        self._z = z
        self._every_c = z.shape[1] - 1 <= _GRAM_PAYS * n_columns
        self._known: Tensor | None = None  # the curvature that the Gram matrix was built with
        self._gram = z

    def at(self, c: float, curvature: Tensor) -> Tensor:
        """For C = c, where `curvature` [rows] is the loss's for C = 1, averaged over the columns."""
        if self._known is None or self._every_c:
            self._known, self._gram = curvature, self._z.T @ (self._z * curvature[:, None])
        hessian = self._gram * (c * curvature.sum() / self._known.sum())
        hessian.diagonal()[:-1] += 1  # the penalty
        return torch.cholesky_inverse(torch.linalg.cholesky(hessian))
