"""Preconditioned L-BFGS (Nocedal 1980) for many logistic regressions side by side, whatever their features look like.

`minimise` knows the regressions only through `Columns`. Each column's coefficients are a row of theta `[columns, p]`
and its scores a row of margins `[columns, rows]`. The line search needs no product with the features of its own:
along the direction the margins are affine in the step. Where the columns can be had in float32, that goes most of the
way, at a half to a third of the cost, and float64 finishes with what L-BFGS has learnt.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

_SLOPE_LEFT = 0.5  # a step is accepted once the slope along the line is down to this share
_MAX_TRIALS = 30  # of one line search
_FLOOR = 1e-12  # a step this small is nothing, whatever the coefficients
_ROUGH = 3e-6  # tolerance in float32; below it, steps are soon made of rounding
_PATIENCE = 4  # a column that has made no shorter step for so many has met its rounding before that

_COUNTS = (torch.bool, torch.int64)  # of Optimum.converged and n_iter

P = TypeVar("P", contravariant=True)  # what the columns' preconditioner is made of


@dataclass(frozen=True)
class Loss:
    """The weighted logistic loss of columns side by side."""

    positive: Tensor  # [columns, rows], 1.0 = the label holds
    weight: Tensor  # [columns, rows], balanced

    def single(self) -> Loss:
        """The same in float32."""
        return Loss(self.positive.float(), self.weight.float())

    def select(self, chosen: Tensor) -> Loss:
        """The columns at int64 `chosen`."""
        return Loss(self.positive[chosen], self.weight[chosen])

    def residual(self, margins: Tensor, c: float) -> Tensor:
        """Derivative of the loss by the margins [columns, rows]."""
        return torch.sigmoid(margins).sub_(self.positive).mul_(self.weight).mul_(c)

    def curvature(self, margins: Tensor, c: float) -> Tensor:
        """Second derivative of the loss by the margins [columns, rows]."""
        p = torch.sigmoid(margins)
        return p.mul_(1 - p).mul_(self.weight).mul_(c)


class Columns(Protocol[P]):
    """Logistic regressions side by side: how coefficients become margins, and margins' derivatives gradients."""

    @property
    def index(self) -> Tensor:
        """Which regressions: int64 [columns], target * splits + split."""
        ...

    @property
    def loss(self) -> Loss: ...

    def rough(self) -> Columns[P] | None:
        """The same regressions in float32; None where that gains nothing."""
        ...

    def select(self, chosen: Tensor) -> Columns[P]:
        """Those at int64 `chosen`."""
        ...

    def margins(self, theta: Tensor) -> Tensor:
        """The scores [columns, rows]."""
        ...

    def gradients(self, theta: Tensor, residual: Tensor, preconditioner: P) -> tuple[Tensor, Tensor]:
        """The objective's derivative by theta, and the preconditioner times it: both [columns, p]."""
        ...

    def along(self, theta: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a step along `direction`: its margins [columns, rows]; the penalty's slope and bend [columns, 1]."""
        ...

    def lengths(self, theta: Tensor, margins: Tensor, gradient: Tensor, newton: Tensor) -> tuple[Tensor, Tensor]:
        """How long the next preconditioned step and the penalised coefficients are: both [columns]."""
        ...

    def coefficients(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients [columns, d] and intercepts [columns] in units of the raw x."""
        ...


@dataclass(frozen=True)
class Optimum:
    """Where `minimise` came to."""

    theta: Tensor  # [columns, p]
    margins: Tensor  # [columns, rows]
    converged: Tensor  # bool [columns]
    n_iter: Tensor  # int64 [columns]

    def select(self, chosen: Tensor) -> Optimum:
        """The columns at int64 `chosen`."""
        return Optimum(self.theta[chosen], self.margins[chosen], self.converged[chosen], self.n_iter[chosen])

    def replaced(self, chosen: Tensor, found: Optimum) -> Optimum:
        """This with `found` for the columns at int64 `chosen`."""
        pairs = ((getattr(self, name.name), getattr(found, name.name)) for name in fields(self))
        return Optimum(*(ours.index_copy(0, chosen, theirs) for ours, theirs in pairs))


@dataclass(frozen=True)
class Limits:
    """When to stop."""

    tolerance: float  # of the next preconditioned step, relative to the coefficients
    max_iter: int
    patience: int | None = None  # iterations without a shorter step that a column is granted; None: any number


def minimise(
    columns: Columns[P], c: float, theta: Tensor, margins: Tensor, preconditioner: P, limits: Limits, memory: int
) -> Optimum:
    """The optimum of each column for C = c, from theta and its margins on; L-BFGS remembers `memory` pairs."""
    history = _History(memory)
    start = Optimum(theta, margins, *(torch.zeros(len(theta), dtype=kind, device=theta.device) for kind in _COUNTS))
    rough = columns.rough()
    if rough is not None:
        single = replace(start, theta=theta.float(), margins=margins.float())
        near = _descend(rough, c, single, preconditioner, Limits(_ROUGH, limits.max_iter, _PATIENCE), history)
        if bool(near.theta.isfinite().all()):
            theta = near.theta.double()
            start = replace(near, theta=theta, margins=columns.margins(theta))
            history.to_double()
        else:
            history = _History(memory)
    return _descend(columns, c, start, preconditioner, limits, history)


def _descend(
    columns: Columns[P], c: float, start: Optimum, preconditioner: P, limits: Limits, history: _History
) -> Optimum:
    """As near to the optimum as the limits allow, in the precision of the columns."""
    theta, margins, n_iter = start.theta, start.margins, start.n_iter.clone()
    residual = columns.loss.residual(margins, c)
    gradient, newton = columns.gradients(theta, residual, preconditioner)
    shortest, stale = torch.full_like(newton[:, 0], torch.inf), torch.zeros_like(n_iter)
    while True:
        step_length, length = columns.lengths(theta, margins, gradient, newton)
        active = step_length > limits.tolerance * length + _FLOOR
        if limits.patience is not None:
            stale = torch.where(step_length < shortest, 0, stale + 1)
            shortest = torch.minimum(shortest, step_length)
            active &= stale < limits.patience
        n_active = int(active.sum())
        if not n_active or int(n_iter.max()) >= limits.max_iter:
            return Optimum(theta, margins, ~active, n_iter)
        if 2 * n_active <= len(active):
            left, part = active.nonzero()[:, 0], Optimum(theta, margins, ~active, n_iter)
            found = _descend(columns.select(left), c, part.select(left), preconditioner, limits, history.select(left))
            return part.replaced(left, found)
        n_iter += active
        direction = -history.apply(gradient, newton) * active[:, None]
        step, margins, residual = _line_search(columns, c, theta, direction, margins, residual, active)
        theta = theta + step
        gradient_before, newton_before = gradient, newton
        gradient, newton = columns.gradients(theta, residual, preconditioner)
        history.push(step, gradient - gradient_before, newton - newton_before)


class _History:
    """L-BFGS's memory of steps s and changes of gradient y, with the preconditioned changes P y beside them.

    P is linear, so keeping P y saves its product: the two-loop recursion only adds vectors.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.pairs: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # s, y, P y [columns, p]; 1 / s.y [columns, 1]
        self.gamma: Tensor | float = 1.0  # size of the inverse Hessian relative to P, [columns, 1]

    def select(self, chosen: Tensor) -> _History:
        """The columns at int64 `chosen`."""
        part = _History(self.memory)
        part.pairs = [(s[chosen], y[chosen], py[chosen], rho[chosen]) for s, y, py, rho in self.pairs]
        part.gamma = self.gamma[chosen] if isinstance(self.gamma, Tensor) else self.gamma
        return part

    def to_double(self) -> None:
        """What was learnt in float32, for float64."""
        self.pairs = [(s.double(), y.double(), py.double(), rho.double()) for s, y, py, rho in self.pairs]
        if isinstance(self.gamma, Tensor):
            self.gamma = self.gamma.double()

    def apply(self, gradient: Tensor, newton: Tensor) -> Tensor:
        """The inverse Hessian's estimate times `gradient`, where newton = P gradient."""
        q, r, weights = gradient, newton, []
        for s, y, py, rho in reversed(self.pairs):
            a = rho * dot(s, q)
            weights.append(a)
            q, r = q - a * y, r - a * py
        r = self.gamma * r
        for (s, y, _, rho), a in zip(self.pairs, reversed(weights), strict=True):
            r = r + s * (a - rho * dot(y, r))
        return r

    def push(self, s: Tensor, y: Tensor, py: Tensor) -> None:
        """Remember a step; columns without positive curvature (those that stand still) keep what they had."""
        sy, ypy = dot(s, y), dot(y, py)
        curved = (sy > 0) & (ypy > 0)
        one = torch.ones_like(sy)
        rho = torch.where(curved, 1 / torch.where(curved, sy, one), 0 * one)
        self.gamma = torch.where(curved, sy / torch.where(curved, ypy, one), self.gamma * one)
        self.pairs = [*self.pairs, (s, y, py, rho)][-self.memory :]


def _line_search(
    columns: Columns[P],
    c: float,
    theta: Tensor,
    direction: Tensor,
    margins: Tensor,
    residual: Tensor,
    active: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps [columns, p] that bring the slope down to `_SLOPE_LEFT`, with the margins and residual there.

    The objective is convex along the line, so its slope alone brackets the minimum: Newton's method on the slope,
    bisection where that leaves the bracket. One product, for the margins of the direction.
    """
    ahead, across, along = columns.along(theta, direction)
    slope_0 = across + dot(residual, ahead)
    size = torch.ones_like(slope_0)
    low, high = torch.zeros_like(size), torch.full_like(size, torch.inf)
    for _ in range(_MAX_TRIALS):
        there = torch.addcmul(margins, size, ahead)
        residual = columns.loss.residual(there, c)
        slope = across + size * along + dot(residual, ahead)
        steep = (slope.abs() > _SLOPE_LEFT * slope_0.abs()) & active[:, None]
        if not bool(steep.any()):
            break
        low = torch.where(slope < 0, torch.maximum(low, size), low)
        high = torch.where(slope > 0, torch.minimum(high, size), high)
        bend = along + dot(columns.loss.curvature(there, c), ahead * ahead)
        newton = size - slope / bend
        middle = torch.where(high.isinf(), 2 * size, (low + high) / 2)
        size = torch.where(steep, torch.where((newton > low) & (newton < high), newton, middle), size)
    return size * direction, there, residual


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products by column, [columns, 1]."""
    return (a * b).sum(dim=1, keepdim=True)
