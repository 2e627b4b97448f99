"""Preconditioned L-BFGS (Nocedal 1980) for many logistic regressions side by side.

`minimise` knows the regressions only through `Columns`. Each column's coefficients are a row of theta `[columns, p]`
and its scores a row of margins `[columns, rows]`. The line search needs no product with the features of its own:
along the direction the margins are affine in the step.

Where float32 is quicker it goes most of the way. Then the gradient is taken in float64, once, and float32 goes the
short rest on the parabola that the loss is there: how exact the solution is depends on that gradient, the steps only
say how soon it is found (iterative refinement, Wilkinson 1963). The last step, found to be short enough, costs no
product and is taken as well: on the benchmark's problems that left a third of the error.

Pairs carried from C to C, rescaled, saved a tenth of the iterations and no time.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from delta_selectivity.probing.backends.history import History, dot

_SLOPE_LEFT = 0.5  # a step is accepted once the slope along the line is down to this share
_MAX_TRIALS = 30  # of one line search
_FLOOR = 1e-12  # a step this small is nothing, whatever the coefficients
_ROUGH = 3e-4  # tolerance before the gradient is taken in float64; below 3e-6 a step in float32 is soon all rounding
_PATIENCE = 4  # a column that has made no shorter step for so many has met its rounding before that
_LEAP = 2  # times longer may a last step be that is taken as well
_NEAR = 1e-3  # change of the coefficients, relative, up to which the parabola is as good as the loss

_COUNTS = (torch.bool, torch.int64)  # of Optimum.converged and n_iter

P = TypeVar("P", contravariant=True)  # what the columns' preconditioner is made of


@dataclass(frozen=True)
class Loss:
    """The weighted logistic loss of columns side by side."""

    weight: Tensor  # [columns, rows], balanced, times C
    pull: Tensor  # [columns, rows], the weight where the label holds, else 0

    @classmethod
    def of(cls, labels: Tensor, weight: Tensor) -> Loss:
        """From labels (bool) and weights (float64), both [columns, rows]."""
        return cls(weight, weight * labels)

    def times(self, c: float) -> Loss:
        """c times this."""
        return Loss(self.weight * c, self.pull * c)

    def single(self) -> Loss:
        """The same in float32."""
        return Loss(self.weight.float(), self.pull.float())

    def select(self, chosen: Tensor) -> Loss:
        """The columns at int64 `chosen`."""
        return Loss(self.weight[chosen], self.pull[chosen])

    def residual(self, margins: Tensor) -> Tensor:
        """Derivative of the loss by the margins [columns, rows]."""
        return torch.sigmoid(margins).mul_(self.weight).sub_(self.pull)

    def curvature(self, margins: Tensor) -> Tensor:
        """Second derivative of the loss by the margins [columns, rows]."""
        p = torch.sigmoid(margins)
        return torch.addcmul(p, p, p, value=-1).mul_(self.weight)


@dataclass(frozen=True)
class Parabola:
    """What the loss is near a point; margins are those beyond the point's, and so is the residual."""

    bend: Tensor  # [columns, rows], the loss's curvature at the point

    def select(self, chosen: Tensor) -> Parabola:
        """The columns at int64 `chosen`."""
        return Parabola(self.bend[chosen])

    def residual(self, margins: Tensor) -> Tensor:
        """Derivative by the margins [columns, rows]."""
        return self.bend * margins

    def curvature(self, margins: Tensor) -> Tensor:
        """Second derivative by the margins [columns, rows]."""
        return self.bend


class Columns(Protocol[P]):
    """Logistic regressions side by side: how coefficients become margins, and margins' derivatives gradients."""

    @property
    def index(self) -> Tensor:
        """Which regressions: int64 [columns], target * splits + split."""
        ...

    @property
    def loss(self) -> Loss | Parabola: ...

    def times(self, c: float) -> Columns[P]:
        """The same with c times the loss."""
        ...

    def rough(self) -> RoughColumns[P] | None:
        """The same in float32; None where that gains nothing."""
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

    def along(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Of a step along `direction`: its margins [columns, rows], and the penalty's bend [columns, 1]."""
        ...

    def lengths(self, theta: Tensor, margins: Tensor, gradient: Tensor, newton: Tensor) -> tuple[Tensor, Tensor]:
        """How long the next preconditioned step and the penalised coefficients are: both [columns]."""
        ...

    def coefficients(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients [columns, d] and intercepts [columns] in units of the raw x."""
        ...


class RoughColumns(Columns[P], Protocol[P]):
    """Logistic regressions in float32."""

    def near(self, theta: Tensor, margins: Tensor, gradient: Tensor) -> Columns[P]:
        """The same near theta, where these margins and this gradient are: with a parabola for the loss."""
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

    tolerance: float  # of the next preconditioned step, relative to the coefficients: one so short is the last
    max_iter: int
    patience: int | None = None  # iterations without a shorter step that a column is granted; None: any number
    leap: bool = False  # take the last step too; the margins stay where it starts


def minimise(
    columns: Columns[P], theta: Tensor, margins: Tensor, preconditioner: P, limits: Limits, memory: int
) -> Optimum:
    """The optimum of each column, from theta and its margins on; L-BFGS remembers `memory` pairs."""
    start = Optimum(theta, margins, *(torch.zeros(len(theta), dtype=kind, device=theta.device) for kind in _COUNTS))
    rough, history = columns.rough(), History(memory)
    if rough is None:
        return _exactly(columns, start, preconditioner, limits, history)
    point = _Point.at(rough, theta.float(), margins.float(), preconditioner)
    to_parabola = Limits(_ROUGH, limits.max_iter, _PATIENCE, leap=True)
    found = _descend(rough, point, start.n_iter, preconditioner, to_parabola, history)
    if not bool(found.theta.isfinite().all()):
        start = replace(start, margins=columns.margins(theta))  # a leap at the smaller C has left them behind
        return _exactly(columns, start, preconditioner, limits, History(memory))
    theta = found.theta.double()
    start = replace(found, theta=theta, margins=columns.margins(theta))
    found = _refine(columns, rough, start, preconditioner, limits, history)
    far = _far(found.theta, start.theta)
    if not len(far):
        return found
    exact = _exactly(columns.select(far), start.select(far), preconditioner, limits, History(memory))
    return found.replaced(far, exact)


def _exactly(columns: Columns[P], start: Optimum, preconditioner: P, limits: Limits, history: History) -> Optimum:
    """In the columns' own precision all the way."""
    point = _Point.at(columns, start.theta, start.margins, preconditioner)
    return _descend(columns, point, start.n_iter, preconditioner, limits, history)


def _refine(
    columns: Columns[P], rough: RoughColumns[P], start: Optimum, preconditioner: P, limits: Limits, history: History
) -> Optimum:
    """The optimum of the parabola that the objective is near `start`: the gradient there is exact."""
    exact = _Point.at(columns, start.theta, start.margins, preconditioner)
    theta, gradient, newton = exact.theta.float(), exact.gradient.float(), exact.newton.float()
    parabola = rough.near(theta, exact.margins, gradient)
    nothing = torch.zeros_like(exact.margins, dtype=theta.dtype)
    last = replace(limits, tolerance=_LEAP * limits.tolerance, leap=True)
    point = _Point(theta, nothing, nothing, gradient, newton)
    found = _descend(parabola, point, start.n_iter, preconditioner, last, history)
    return replace(found, theta=exact.theta + (found.theta - theta), margins=exact.margins + found.margins)


def _far(theta: Tensor, before: Tensor) -> Tensor:
    """The columns that have gone too far for a parabola: int64."""
    return ((theta - before).norm(dim=1) > _NEAR * theta.norm(dim=1) + _FLOOR).nonzero()[:, 0]


@dataclass(frozen=True)
class _Point:
    """Where columns stand, and what they see there."""

    theta: Tensor  # [columns, p]
    margins: Tensor  # [columns, rows]
    residual: Tensor  # [columns, rows], derivative of the loss by the margins
    gradient: Tensor  # [columns, p]
    newton: Tensor  # [columns, p], the preconditioner times the gradient

    @classmethod
    def at(cls, columns: Columns[P], theta: Tensor, margins: Tensor, preconditioner: P) -> _Point:
        """By products of the columns' own precision."""
        residual = columns.loss.residual(margins)
        return cls(theta, margins, residual, *columns.gradients(theta, residual, preconditioner))

    def select(self, chosen: Tensor) -> _Point:
        """The columns at int64 `chosen`."""
        return _Point(*(getattr(self, name.name)[chosen] for name in fields(self)))


def _descend(
    columns: Columns[P], point: _Point, n_iter: Tensor, preconditioner: P, limits: Limits, history: History
) -> Optimum:
    """As near to the optimum as the limits allow, from a point after n_iter (int64 [columns]) iterations on."""
    shortest, stale = torch.full_like(point.newton[:, 0], torch.inf), torch.zeros_like(n_iter)
    while True:
        step_length, length = columns.lengths(point.theta, point.margins, point.gradient, point.newton)
        short = step_length <= limits.tolerance * length + _FLOOR
        active = ~short  # so NaN is no convergence
        if limits.patience is not None:
            stale = torch.where(step_length < shortest, 0, stale + 1)
            shortest = torch.minimum(shortest, step_length)
            active &= stale < limits.patience
        n_active = int(active.sum())
        stopped = not n_active or int(n_iter.max()) >= limits.max_iter
        if stopped or 2 * n_active <= len(active):
            theta = point.theta
            if limits.leap:
                theta = theta + history.step(point.gradient, point.newton) * short[:, None]
            here = Optimum(theta, point.margins, ~active, n_iter)
            if stopped:
                return here
            left = active.nonzero()[:, 0]
            rest = columns.select(left), point.select(left), n_iter[left]
            return here.replaced(left, _descend(*rest, preconditioner, limits, history.select(left)))
        n_iter = n_iter + active
        direction = history.step(point.gradient, point.newton) * active[:, None]
        step, margins, residual = _line_search(columns, point, direction, active)
        theta = point.theta + step
        gradient, newton = columns.gradients(theta, residual, preconditioner)
        history.push(step, gradient - point.gradient, newton - point.newton)
        point = _Point(theta, margins, residual, gradient, newton)


def _line_search(
    columns: Columns[P], point: _Point, direction: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps [columns, p] that bring the slope down to `_SLOPE_LEFT`, with the margins and residual there.

    The objective is convex along the line, so its slope alone brackets the minimum: Newton's method on the slope,
    bisection where that leaves the bracket. One product, for the margins of the direction.
    """
    ahead, along = columns.along(direction)
    slope_0, level = dot(point.gradient, direction), dot(point.residual, ahead)
    size = torch.ones_like(slope_0)
    low, high = torch.zeros_like(size), torch.full_like(size, torch.inf)
    for _ in range(_MAX_TRIALS):
        there = torch.addcmul(point.margins, size, ahead)
        residual = columns.loss.residual(there)
        slope = slope_0 + size * along + (dot(residual, ahead) - level)
        steep = (slope.abs() > _SLOPE_LEFT * slope_0.abs()) & active[:, None]
        if not bool(steep.any()):
            break
        low = torch.where(slope < 0, torch.maximum(low, size), low)
        high = torch.where(slope > 0, torch.minimum(high, size), high)
        bend = along + dot(columns.loss.curvature(there), ahead * ahead)
        newton = size - slope / bend
        middle = torch.where(high.isinf(), 2 * size, (low + high) / 2)
        size = torch.where(steep, torch.where((newton > low) & (newton < high), newton, middle), size)
    return size * direction, there, residual
