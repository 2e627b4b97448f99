"""Batched, preconditioned L-BFGS for logistic regression, on any device.

The columns (target x split) of a problem are solved together: held-out rows have weight 0, so the matrix is the
same for all of them and an iteration costs two large GEMMs, whatever the number of columns. Along C each column
starts from its solution at the smaller C. The preconditioner is the inverse of the Hessian at that start, averaged
over the columns (Böhning 1992's fixed bound 1/4 in place of p (1 - p) needs up to 4 times the iterations at large C).
L-BFGS (Nocedal 1980) learns what the average leaves out. The line search needs no GEMM: along the direction the
margins are affine in the step.

Float64 throughout: float32 GEMMs gave the same coefficients to 1e-6 for 1.2 to 1.4 times the speed on a CPU, but
they stall above the tolerance where C is small.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from probe_backends.problem import ProbeFits, ProbeProblem, balanced

_TEMPORARIES = 10  # float64 matrices [columns, rows] alive at once
_SLOPE_LEFT = 0.5  # a step is accepted once the slope along the line is down to this share
_MAX_TRIALS = 30  # of one line search
_FLOOR = 1e-12  # a step this small is nothing, whatever the coefficients


@dataclass(frozen=True)
class TorchLbfgs:
    """The batched solver. Deterministic for one machine and number of threads."""

    tolerance: float = 1e-6  # of the next (preconditioned) step, relative to the coefficients
    max_iter: int = 500  # for each C
    memory: int = 10  # pairs that L-BFGS remembers
    max_bytes: int = 256 * 2**20  # of temporaries [columns, rows]; columns beyond wait for the next chunk
    name: str = field(default="torch", init=False)

    def fit(self, problem: ProbeProblem) -> ProbeFits:
        """All probes of the problem; `converged` is False for columns that `max_iter` stopped."""
        fits = ProbeFits.empty(problem)
        rows, d = problem.x.shape
        n_columns = problem.n_targets * problem.n_splits
        width = max(1, self.max_bytes // (8 * _TEMPORARIES * max(rows, 1)))
        unit = problem.divisor.log().mean(dim=0).exp()  # [d], between the splits' scales
        centre = problem.x.double().mean(dim=0)
        z = torch.ones(rows, d + 1, dtype=torch.float64, device=problem.x.device)
        z[:, :d] = (problem.x - centre) / unit
        for first in range(0, n_columns, width):
            columns = _columns(problem, z, unit, torch.arange(first, min(first + width, n_columns)))
            self._fit_chunk(problem.cs, columns, fits, unit, centre)
        return fits

    def _fit_chunk(
        self, cs: tuple[float, ...], columns: _Columns, fits: ProbeFits, unit: Tensor, centre: Tensor
    ) -> None:
        """Solve the columns for every C, and write them into `fits` in the units of x."""
        theta = torch.zeros_like(columns.stretch)
        margins = torch.zeros_like(columns.weight)
        d = len(unit)
        for i, c in enumerate(cs):
            theta, margins, converged, n_iter = self._minimise(columns, c, theta, margins)
            raw = theta * columns.stretch
            coef = raw[:, :d] / unit
            fits.coef[i].flatten(0, 1)[columns.index] = coef
            fits.intercept[i].flatten()[columns.index] = raw[:, d] - coef @ centre
            fits.converged[i].flatten()[columns.index] = converged
            fits.n_iter[i].flatten()[columns.index] = n_iter

    def _minimise(
        self, columns: _Columns, c: float, theta: Tensor, margins: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """theta [columns, d + 1] and margins [columns, rows] at the optimum for C = c; converged and n_iter."""
        inverse = columns.inverse_hessian(c, margins)
        residual = columns.residual(margins, c)
        gradient = columns.gradient(theta, residual)
        newton = gradient @ inverse
        history = _History(self.memory)
        n_iter = torch.zeros(len(theta), dtype=torch.int64, device=theta.device)
        while True:
            active = newton.norm(dim=1) > self.tolerance * theta[:, :-1].norm(dim=1) + _FLOOR
            if not bool(active.any()) or int(n_iter.max()) >= self.max_iter:
                return theta, margins, ~active, n_iter
            n_iter += active
            direction = -history.apply(gradient, newton) * active[:, None]
            step, margins, residual = _line_search(columns, c, theta, direction, margins, residual, active)
            theta = theta + step
            before, gradient = gradient, columns.gradient(theta, residual)
            newton_before, newton = newton, gradient @ inverse
            history.push(step, gradient - before, newton - newton_before)


@dataclass(frozen=True)
class _Columns:
    """Logistic regressions side by side; theta [columns, d + 1] has the intercept last.

    Features are z times `stretch`, so each column sees x by the scale of its own split.
    """

    index: Tensor  # int64 [columns], target * splits + split
    z: Tensor  # [rows, d + 1], shared, the last column is 1
    stretch: Tensor  # [columns, d + 1]
    positive: Tensor  # [columns, rows], 1.0 = the label holds
    weight: Tensor  # [columns, rows], balanced
    penalty: Tensor  # [d + 1], 1 but 0 for the intercept

    def margins(self, theta: Tensor) -> Tensor:
        """The scores [columns, rows]."""
        return (theta * self.stretch) @ self.z.T

    def residual(self, margins: Tensor, c: float) -> Tensor:
        """Derivative of the loss by the margins [columns, rows]."""
        return torch.sigmoid(margins).sub_(self.positive).mul_(self.weight).mul_(c)

    def curvature(self, margins: Tensor, c: float) -> Tensor:
        """Second derivative of the loss by the margins [columns, rows]."""
        p = torch.sigmoid(margins)
        return p.mul_(1 - p).mul_(self.weight).mul_(c)

    def gradient(self, theta: Tensor, residual: Tensor) -> Tensor:
        """Derivative of the objective by theta [columns, d + 1]."""
        return (residual @ self.z).mul_(self.stretch).add_(theta * self.penalty)

    def inverse_hessian(self, c: float, margins: Tensor) -> Tensor:
        """The inverse [d + 1, d + 1] of the Hessian averaged over the columns, for stretch 1."""
        h = self.curvature(margins, c).mean(dim=0)
        hessian = self.z.T @ (self.z * h[:, None])
        hessian.diagonal().add_(self.penalty)
        return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def _columns(problem: ProbeProblem, z: Tensor, unit: Tensor, index: Tensor) -> _Columns:
    index = index.to(z.device)
    target, split = index // problem.n_splits, index % problem.n_splits
    labels = problem.labels.to(z.device)[target]
    ones = torch.ones(len(index), 1, dtype=z.dtype, device=z.device)
    penalty = torch.ones(z.shape[1], dtype=z.dtype, device=z.device)
    penalty[-1] = 0
    return _Columns(
        index=index,
        z=z,
        stretch=torch.cat([unit / problem.divisor.to(z.device)[split], ones], dim=1),
        positive=labels.double(),
        weight=balanced(labels, problem.weight.to(z.device)[split]),
        penalty=penalty,
    )


class _History:
    """L-BFGS's memory of steps s and changes of gradient y, with the preconditioned changes P y beside them.

    P is linear, so keeping P y saves its GEMM: the two-loop recursion only adds vectors.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.pairs: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # s, y, P y [columns, d + 1]; 1 / s.y [columns, 1]
        self.gamma: Tensor | float = 1.0  # size of the inverse Hessian relative to P, [columns, 1]

    def apply(self, gradient: Tensor, newton: Tensor) -> Tensor:
        """The inverse Hessian's estimate times `gradient`, where newton = P gradient."""
        q, r, weights = gradient, newton, []
        for s, y, py, rho in reversed(self.pairs):
            a = rho * _dot(s, q)
            weights.append(a)
            q, r = q - a * y, r - a * py
        r = self.gamma * r
        for (s, y, _, rho), a in zip(self.pairs, reversed(weights), strict=True):
            r = r + s * (a - rho * _dot(y, r))
        return r

    def push(self, s: Tensor, y: Tensor, py: Tensor) -> None:
        """Remember a step; columns without positive curvature (those that stand still) keep what they had."""
        sy, ypy = _dot(s, y), _dot(y, py)
        curved = (sy > 0) & (ypy > 0)
        one = torch.ones_like(sy)
        rho = torch.where(curved, 1 / torch.where(curved, sy, one), 0 * one)
        self.gamma = torch.where(curved, sy / torch.where(curved, ypy, one), self.gamma * one)
        self.pairs = [*self.pairs, (s, y, py, rho)][-self.memory :]


def _line_search(
    columns: _Columns, c: float, theta: Tensor, direction: Tensor, margins: Tensor, residual: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps [columns, d + 1] that bring the slope down to `_SLOPE_LEFT`, with the margins and residual there.

    The objective is convex along the line, so its slope alone brackets the minimum: Newton's method on the slope,
    bisection where that leaves the bracket. One GEMM, for the margins of the direction.
    """
    ahead = columns.margins(direction)
    across, along = (_dot(columns.penalty * direction, v) for v in (theta, direction))
    slope_0 = across + _dot(residual, ahead)
    size = torch.ones_like(slope_0)
    low, high = torch.zeros_like(size), torch.full_like(size, torch.inf)
    for _ in range(_MAX_TRIALS):
        there = torch.addcmul(margins, size, ahead)
        residual = columns.residual(there, c)
        slope = across + size * along + _dot(residual, ahead)
        steep = (slope.abs() > _SLOPE_LEFT * slope_0.abs()) & active[:, None]
        if not bool(steep.any()):
            break
        low = torch.where(slope < 0, torch.maximum(low, size), low)
        high = torch.where(slope > 0, torch.minimum(high, size), high)
        bend = along + _dot(columns.curvature(there, c), ahead * ahead)
        newton = size - slope / bend
        middle = torch.where(high.isinf(), 2 * size, (low + high) / 2)
        size = torch.where(steep, torch.where((newton > low) & (newton < high), newton, middle), size)
    return size * direction, there, residual


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products by column, [columns, 1]."""
    return (a * b).sum(dim=1, keepdim=True)
