"""Batched, preconditioned L-BFGS for logistic regression, on any device.

The columns (target x split) of a problem are solved together: held-out rows have weight 0, so the matrix is the
same for all of them and an iteration costs two large GEMMs, whatever the number of columns. Along C each column
starts from its solution at the smaller C. The preconditioner is the inverse of the Hessian at that start, averaged
over the columns; where columns are few, the Hessian at zero (Böhning 1992's bound) shrunk to the mean curvature,
since building another costs as much as d / (2 columns) iterations. L-BFGS (Nocedal 1980) learns what that leaves
out. The line search needs no GEMM of its own: along the direction the margins are affine in the step.

Float64 throughout: float32 GEMMs gave the same coefficients to 1e-6 for 1.2 to 1.4 times the speed on a CPU, but
they stall above the tolerance where C is small.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from out_of_memory import ERRORS, is_out_of_memory
from probe_backends.problem import ProbeFits, ProbeProblem, balanced

log = logging.getLogger(__name__)

_TEMPORARIES = 10  # float64 matrices [columns, rows] alive at once
_SLOPE_LEFT = 0.5  # a step is accepted once the slope along the line is down to this share
_MAX_TRIALS = 30  # of one line search
_GRAM_PAYS = 12  # a Hessian is built anew for each C up to this many features a column
_FLOOR = 1e-12  # a step this small is nothing, whatever the coefficients


@dataclass(frozen=True)
class TorchLbfgs:
    """The batched solver. Deterministic for one machine and number of threads."""

    tolerance: float = 1e-6  # of the next (preconditioned) step, relative to the coefficients
    max_iter: int = 500  # for each C
    memory: int = 10  # pairs that L-BFGS remembers
    max_bytes: int = 256 * 2**20  # of temporaries [columns, rows]; columns beyond wait for the next chunk
    name: str = field(default="torch", init=False)
    _room: _Room = field(default_factory=lambda: _Room(), init=False, repr=False, compare=False)

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
            index = torch.arange(first, min(first + width, n_columns))
            self._within_memory(problem, z, unit, centre, index, fits)
        return fits

    def _within_memory(
        self, problem: ProbeProblem, z: Tensor, unit: Tensor, centre: Tensor, index: Tensor, fits: ProbeFits
    ) -> None:
        """Solve these columns together; out of memory, in parts of half as many, and in such parts from then on."""
        while True:
            size = min(len(index), self._room.columns(len(z)))
            try:
                self._fit_chunk(problem.cs, _Parts(problem, z, unit, index.split(size)), fits, unit, centre)
            except ERRORS as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
            else:
                self._room.tell_once(size)
                return
            if z.device.type == "cuda":
                torch.cuda.empty_cache()
            self._room.shrink(size // 2, len(z))

    def _fit_chunk(self, cs: tuple[float, ...], parts: _Parts, fits: ProbeFits, unit: Tensor, centre: Tensor) -> None:
        """Solve the columns for every C, and write them into `fits` in the units of x."""
        d = len(unit)
        known = parts.mean_curvature()
        gram = parts.columns.gram(known)
        for i, c in enumerate(cs):
            curvature = parts.mean_curvature()
            if i > 0 and d <= _GRAM_PAYS * parts.n_columns:
                known, gram = curvature, parts.columns.gram(curvature)
            inverse = parts.columns.inverse_hessian(gram * (c * curvature.sum() / known.sum()))
            for columns, theta, margins in parts:
                theta, margins, converged, n_iter = self._minimise(columns, c, theta, margins, inverse)
                parts.keep(theta, margins)
                raw = theta * columns.stretch
                coef = raw[:, :d] / unit
                fits.coef[i].flatten(0, 1)[columns.index] = coef
                fits.intercept[i].flatten()[columns.index] = raw[:, d] - coef @ centre
                fits.converged[i].flatten()[columns.index] = converged
                fits.n_iter[i].flatten()[columns.index] = n_iter

    def _minimise(
        self, columns: _Columns, c: float, theta: Tensor, margins: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """theta [columns, d + 1] and margins [columns, rows] at the optimum for C = c; converged and n_iter."""
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

    def gram(self, curvature: Tensor) -> Tensor:
        """z' diag(curvature) z, [d + 1, d + 1]: the loss's Hessian for stretch 1, with curvature [rows]."""
        return self.z.T @ (self.z * curvature[:, None])

    def inverse_hessian(self, loss_hessian: Tensor) -> Tensor:
        """The inverse [d + 1, d + 1] of the objective's Hessian."""
        return torch.cholesky_inverse(torch.linalg.cholesky(loss_hessian + torch.diag(self.penalty)))


class _Parts:
    """Columns that share a preconditioner, in parts that are solved one after the other.

    A single part keeps its margins from one C to the next. Of several only theta is kept, the rest is made anew: its
    memory is what they are split for. Sharing the preconditioner, each column takes the same steps either way.
    """

    def __init__(self, problem: ProbeProblem, z: Tensor, unit: Tensor, parts: Sequence[Tensor]) -> None:
        self._problem, self._z, self._unit, self._parts = problem, z, unit, parts
        self.n_columns = sum(map(len, parts))
        self._theta = [torch.zeros(len(index), z.shape[1], dtype=z.dtype, device=z.device) for index in parts]
        self._go_to(0)

    def __iter__(self) -> Iterator[tuple[_Columns, Tensor, Tensor]]:
        """Each part's columns, theta [columns, d + 1] and margins [columns, rows]."""
        for place in range(len(self._parts)):
            if place != self._place:
                del self.columns, self._margins
                self._go_to(place)
            yield self.columns, self._theta[place], self._margins

    def keep(self, theta: Tensor, margins: Tensor) -> None:
        """Where the part last given by iteration stands now."""
        self._theta[self._place], self._margins = theta, margins

    def mean_curvature(self) -> Tensor:
        """Second derivative of the loss for C = 1 by the margins, averaged over all columns. [rows]"""
        total = torch.zeros(len(self._z), dtype=self._z.dtype, device=self._z.device)
        for columns, _, margins in self:
            total += columns.curvature(margins, 1.0).sum(dim=0)
        return total / self.n_columns

    def _go_to(self, place: int) -> None:
        self._place = place
        self.columns = _columns(self._problem, self._z, self._unit, self._parts[place])
        self._margins = self.columns.margins(self._theta[place])


@dataclass
class _Room:
    """What was learnt of the memory, for problems of any number of rows."""

    max_cells: int | None = None  # columns x rows
    told: bool = False

    def columns(self, rows: int) -> int:
        """Columns to try at a time."""
        return sys.maxsize if self.max_cells is None else max(1, self.max_cells // max(rows, 1))

    def shrink(self, columns: int, rows: int) -> None:
        """More than these did not fit."""
        self.max_cells = columns * max(rows, 1)

    def tell_once(self, columns: int) -> None:
        """Say what came of it, the first time."""
        if self.max_cells is not None and not self.told:
            self.told = True
            log.warning("out of memory: probes are fitted %d at a time from now on; no number changes", columns)


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
