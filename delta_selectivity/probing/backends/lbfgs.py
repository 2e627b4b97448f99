"""Preconditioned L-BFGS (Nocedal 1980) for many logistic regressions side by side.

`minimise` accesses the regressions only through `Columns`. Each column's coefficients are a row of theta `[columns, p]`
and its scores a row of margins `[columns, rows]`. The margins are affine in the step size, so the line search needs
only one product with the features.

Where float32 is faster, most iterations use it. Then the gradient is computed once in float64, and float32 minimises
a quadratic model of the loss around that point. The accuracy of the solution depends on that gradient; the steps only
affect how fast it is found (iterative refinement, Wilkinson 1963). Where C is still to be chosen, only the solution in
float32 is needed (`approach`), and the rest for the C that is chosen (`finish`).

The final step, below the tolerance, needs no product and is applied too: on the benchmark's problems this reduced the
error to a third.

Tried without gain: reusing the rescaled history for the next C saved a tenth of the iterations and no time.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from delta_selectivity.probing.backends.history import CompiledHistory, History, dot

_SLOPE_FRACTION = 0.5  # accept a step once the slope along the line is reduced to this fraction
_MAX_TRIALS = 30  # maximum step sizes tried in one line search
_FLOOR = 1e-12  # absolute step length that always counts as converged
_FLOAT32_TOLERANCE = 3e-4  # before the float64 gradient; below 3e-6, float32 steps are mostly rounding error
_PATIENCE = 4  # stop a float32 column after this many iterations without a shorter step: it is at rounding error
_FINAL_STEP_FACTOR = 2  # accept a final step up to this multiple of the tolerance
_MAX_MOVE = 1e-3  # relative change of the coefficients up to which the quadratic model is as good as the loss

_COUNTS = (torch.bool, torch.int64)  # dtypes of Optimum.converged and n_iter


class Selectable(Protocol):
    """A preconditioner of some columns."""

    def select(self, chosen: Tensor) -> Self:
        """Return the preconditioner of the columns at int64 `chosen`."""
        ...


P = TypeVar("P", bound=Selectable)  # type of the columns' preconditioner


@dataclass(frozen=True)
class Loss:
    """The weighted logistic loss of columns side by side."""

    weight: Tensor  # [columns, rows], balanced, times C
    positive_weight: Tensor  # [columns, rows], the weight where the label holds, else 0

    @classmethod
    def of(cls, labels: Tensor, weight: Tensor) -> Loss:
        """Build the loss from labels (bool) and weights (float64), both [columns, rows]."""
        return cls(weight, weight * labels)

    def scaled(self, c: float) -> Loss:
        """Return the loss multiplied by c."""
        return Loss(self.weight * c, self.positive_weight * c)

    def in_float32(self) -> Loss:
        """Return the loss in float32."""
        return Loss(self.weight.float(), self.positive_weight.float())

    def select(self, chosen: Tensor) -> Loss:
        """Return the columns at int64 `chosen`."""
        return Loss(self.weight[chosen], self.positive_weight[chosen])

    def residual(self, margins: Tensor) -> Tensor:
        """Return the derivative of the loss by the margins [columns, rows]."""
        return torch.sigmoid(margins).mul_(self.weight).sub_(self.positive_weight)

    def curvature(self, margins: Tensor) -> Tensor:
        """Return the second derivative of the loss by the margins [columns, rows]."""
        p = torch.sigmoid(margins)
        return torch.addcmul(p, p, p, value=-1).mul_(self.weight)


@dataclass(frozen=True)
class QuadraticLoss:
    """A quadratic model of the loss around a point; margins and residuals are relative to those at the point."""

    second_derivative: Tensor  # [columns, rows], of the loss by the margins at the point

    def select(self, chosen: Tensor) -> QuadraticLoss:
        """Return the columns at int64 `chosen`."""
        return QuadraticLoss(self.second_derivative[chosen])

    def residual(self, margins: Tensor) -> Tensor:
        """Return the derivative by the margins [columns, rows]."""
        return self.second_derivative * margins

    def curvature(self, margins: Tensor) -> Tensor:
        """Return the second derivative by the margins [columns, rows]."""
        return self.second_derivative


class Columns(Protocol[P]):
    """Logistic regressions side by side: maps from coefficients to margins, and from residuals to gradients."""

    @property
    def index(self) -> Tensor:
        """Indices of the regressions: int64 [columns], target * splits + split."""
        ...

    @property
    def loss(self) -> Loss | QuadraticLoss: ...

    def scaled(self, c: float) -> Columns[P]:
        """Return the columns with the loss multiplied by c."""
        ...

    def in_float32(self) -> Float32Columns[P] | None:
        """Return the columns in float32; None where float32 is not faster."""
        ...

    def select(self, chosen: Tensor) -> Columns[P]:
        """Return the columns at int64 `chosen`."""
        ...

    def margins(self, theta: Tensor) -> Tensor:
        """Return the scores [columns, rows]."""
        ...

    def gradients(self, theta: Tensor, residual: Tensor, preconditioner: P) -> tuple[Tensor, Tensor]:
        """Return the objective's derivative by theta, and the preconditioner times it: both [columns, p]."""
        ...

    def line_terms(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Return a direction's margins [columns, rows] and the penalty's curvature along it [columns, 1]."""
        ...

    def norms(self, theta: Tensor, margins: Tensor, gradient: Tensor, newton: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norms of the next preconditioned step and of the penalised coefficients: both [columns]."""
        ...

    def coefficients(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return coefficients [columns, d] and intercepts [columns] in units of the raw x."""
        ...

    def own_preconditioner(self, margins: Tensor) -> P:
        """Return the inverse Hessian of each column at its margins [columns, rows]."""
        ...

    def for_kernel(self, preconditioner: P) -> KernelInput | None:
        """Return the input of the compiled loop, or None if the loop does not support these columns."""
        ...


class KernelInput(NamedTuple):
    """The first arguments of `descent_kernels.descend`."""

    features: tuple[NDArray[Any], ...]  # z, its factors for each column, the preconditioner
    loss: tuple[NDArray[Any], ...]  # weight and positive_weight, or twice the second derivative
    logistic: bool  # False: the loss is quadratic
    origin: tuple[NDArray[Any], ...]  # point of expansion and gradient there, if the loss is quadratic


class Float32Columns(Columns[P], Protocol[P]):
    """Logistic regressions in float32."""

    def quadratic_at(self, theta: Tensor, margins: Tensor, gradient: Tensor) -> Columns[P]:
        """Return the columns with a quadratic model of the loss at theta, given the margins and gradient there."""
        ...


@dataclass(frozen=True)
class Optimum:
    """The result of `minimise`."""

    theta: Tensor  # [columns, p]
    margins: Tensor  # [columns, rows]
    converged: Tensor  # bool [columns]
    n_iter: Tensor  # int64 [columns]

    def select(self, chosen: Tensor) -> Optimum:
        """Return the columns at int64 `chosen`."""
        return Optimum(self.theta[chosen], self.margins[chosen], self.converged[chosen], self.n_iter[chosen])

    def with_columns(self, chosen: Tensor, found: Optimum) -> Optimum:
        """Return a copy with `found` in place of the columns at int64 `chosen`."""
        pairs = ((getattr(self, name.name), getattr(found, name.name)) for name in fields(self))
        return Optimum(*(ours.index_copy(0, chosen, theirs) for ours, theirs in pairs))


@dataclass(frozen=True)
class Limits:
    """Stopping criteria."""

    tolerance: float  # stop when the next preconditioned step is this short, relative to the coefficients
    max_iter: int
    patience: int | None = None  # stop a column after this many iterations without a shorter step; None: never
    apply_final_step: bool = False  # apply the final step to theta too; margins are those before it


def minimise(
    columns: Columns[P], theta: Tensor, margins: Tensor, preconditioner: P, limits: Limits, memory: int
) -> Optimum:
    """Find the optimum of each column from theta and its margins; L-BFGS stores `memory` pairs."""
    history = _Histories.empty(memory)
    near, columns32 = _approach(columns, theta, margins, preconditioner, limits, history)
    if columns32 is None:
        return near
    near = replace(near, margins=columns.margins(near.theta))
    return _finish(columns, columns32, near, preconditioner, limits, history)


def approach(
    columns: Columns[P], theta: Tensor, margins: Tensor, preconditioner: P, limits: Limits, memory: int
) -> tuple[Optimum, bool]:
    """Find the optimum by float32 alone, to `_FLOAT32_TOLERANCE`, and return whether it is that of `minimise`.

    It is where float32 is not faster, or fails. Otherwise `finish` makes it so.
    """
    near, columns32 = _approach(columns, theta, margins, preconditioner, limits, _Histories.empty(memory))
    if columns32 is None:
        return near, True
    return replace(near, margins=columns32.margins(near.theta.float()).double()), False


def finish(columns: Columns[P], near: Optimum, preconditioner: P, limits: Limits, memory: int) -> Optimum:
    """Find the optimum from what `approach` returned; the margins must be those of theta in float64."""
    columns32 = columns.in_float32()
    assert columns32 is not None, "`approach` was exact"
    return _finish(columns, columns32, near, preconditioner, limits, _Histories.empty(memory))


def _approach(
    columns: Columns[P], theta: Tensor, margins: Tensor, preconditioner: P, limits: Limits, history: _Histories
) -> tuple[Optimum, Float32Columns[P] | None]:
    """Return the optimum in float32, whose margins are those before the final step, and the columns in float32.

    Where float32 is not faster, or fails: the exact optimum and None.
    """
    start = Optimum(theta, margins, *(torch.zeros(len(theta), dtype=kind, device=theta.device) for kind in _COUNTS))
    columns32 = columns.in_float32()
    if columns32 is None:
        return _minimise_directly(columns, start, preconditioner, limits, history), None
    point = _Point.at(columns32, theta.float(), margins.float(), preconditioner)
    tolerance = max(_FLOAT32_TOLERANCE, limits.tolerance)
    float32_limits = Limits(tolerance, limits.max_iter, _PATIENCE, apply_final_step=True)
    found = _descend(columns32, point, start.n_iter, preconditioner, float32_limits, history)
    if bool(found.theta.isfinite().all()):
        return replace(found, theta=found.theta.double()), columns32
    start = replace(start, margins=columns.margins(theta))  # the final step at the previous C did not update them
    return _minimise_directly(columns, start, preconditioner, limits, _Histories.empty(history.torch.memory)), None


def _finish(
    columns: Columns[P],
    columns32: Float32Columns[P],
    start: Optimum,
    preconditioner: P,
    limits: Limits,
    history: _Histories,
) -> Optimum:
    """Return the exact optimum from that in float32, with its margins in float64."""
    found = _refine(columns, columns32, start, preconditioner, limits, history)
    far = _moved_too_far(found.theta, start.theta)
    if not len(far):
        return found
    rest = columns.select(far), start.select(far), preconditioner.select(far)
    return found.with_columns(far, _minimise_directly(*rest, limits, _Histories.empty(history.torch.memory)))


def _minimise_directly(
    columns: Columns[P], start: Optimum, preconditioner: P, limits: Limits, history: _Histories
) -> Optimum:
    """Minimise entirely in the columns' own precision."""
    point = _Point.at(columns, start.theta, start.margins, preconditioner)
    return _descend(columns, point, start.n_iter, preconditioner, limits, history)


def _refine(
    columns: Columns[P],
    columns32: Float32Columns[P],
    start: Optimum,
    preconditioner: P,
    limits: Limits,
    history: _Histories,
) -> Optimum:
    """Minimise the quadratic model of the objective around `start`, where the gradient is in float64."""
    exact = _Point.at(columns, start.theta, start.margins, preconditioner)
    theta, gradient, newton = exact.theta.float(), exact.gradient.float(), exact.newton.float()
    quadratic = columns32.quadratic_at(theta, exact.margins, gradient)
    zeros = torch.zeros_like(exact.margins, dtype=theta.dtype)
    last = replace(limits, tolerance=_FINAL_STEP_FACTOR * limits.tolerance, apply_final_step=True)
    point = _Point(theta, zeros, zeros, gradient, newton)
    found = _descend(quadratic, point, start.n_iter, preconditioner, last, history)
    return replace(found, theta=exact.theta + (found.theta - theta), margins=exact.margins + found.margins)


def _moved_too_far(theta: Tensor, before: Tensor) -> Tensor:
    """Return the columns that moved too far for the quadratic model: int64."""
    return ((theta - before).norm(dim=1) > _MAX_MOVE * theta.norm(dim=1) + _FLOOR).nonzero()[:, 0]


class _Histories(NamedTuple):
    """The history of a descent, in the forms that torch and the compiled loop use."""

    torch: History
    compiled: CompiledHistory

    @classmethod
    def empty(cls, memory: int) -> _Histories:
        """Return histories without steps that store up to `memory` steps."""
        return cls(History(memory), CompiledHistory(memory))


@dataclass(frozen=True)
class _Point:
    """The current iterate of each column, with its gradients."""

    theta: Tensor  # [columns, p]
    margins: Tensor  # [columns, rows]
    residual: Tensor  # [columns, rows], derivative of the loss by the margins
    gradient: Tensor  # [columns, p]
    newton: Tensor  # [columns, p], the preconditioner times the gradient

    @classmethod
    def at(cls, columns: Columns[P], theta: Tensor, margins: Tensor, preconditioner: P) -> _Point:
        """Compute the gradients at theta in the columns' own precision."""
        residual = columns.loss.residual(margins)
        return cls(theta, margins, residual, *columns.gradients(theta, residual, preconditioner))

    def select(self, chosen: Tensor) -> _Point:
        """Return the columns at int64 `chosen`."""
        return _Point(*(getattr(self, name.name)[chosen] for name in fields(self)))


def _descend(
    columns: Columns[P], point: _Point, n_iter: Tensor, preconditioner: P, limits: Limits, history: _Histories
) -> Optimum:
    """Iterate from a point reached after n_iter (int64 [columns]) iterations until the limits are met."""
    kernel_input = columns.for_kernel(preconditioner)
    if kernel_input is not None:
        return _descend_compiled(kernel_input, point, n_iter, limits, history.compiled)
    return _descend_in_torch(columns, point, n_iter, preconditioner, limits, history.torch)


def _descend_compiled(
    kernel_input: KernelInput, point: _Point, n_iter: Tensor, limits: Limits, history: CompiledHistory
) -> Optimum:
    from delta_selectivity.probing.backends.descent_kernels import descend  # imported here: Numba is slow to load

    changed = [getattr(point, name.name).clone(memory_format=torch.contiguous_format) for name in fields(point)]
    n_iter = n_iter.clone()
    converged = descend(
        *kernel_input,
        tuple(tensor.numpy() for tensor in changed),
        n_iter.numpy(),
        history.arrays(point.theta),
        (limits.tolerance, _FLOOR, limits.max_iter, limits.patience or 0, limits.apply_final_step),
        (_SLOPE_FRACTION, _MAX_TRIALS),
    )
    theta, margins, *_ = changed
    return Optimum(theta, margins, torch.from_numpy(converged), n_iter)


def _descend_in_torch(
    columns: Columns[P], point: _Point, n_iter: Tensor, preconditioner: P, limits: Limits, history: History
) -> Optimum:
    shortest, stale = torch.full_like(point.newton[:, 0], torch.inf), torch.zeros_like(n_iter)
    while True:
        step_length, length = columns.norms(point.theta, point.margins, point.gradient, point.newton)
        short = step_length <= limits.tolerance * length + _FLOOR
        active = ~short  # negated, so that NaN does not count as converged
        if limits.patience is not None:
            stale = torch.where(step_length < shortest, 0, stale + 1)
            shortest = torch.minimum(shortest, step_length)
            active &= stale < limits.patience
        n_active = int(active.sum())
        stopped = not n_active or int(n_iter.max()) >= limits.max_iter
        if stopped or 2 * n_active <= len(active):
            theta = point.theta
            if limits.apply_final_step:
                theta = theta + history.step(point.gradient, point.newton) * short[:, None]
            here = Optimum(theta, point.margins, ~active, n_iter)
            if stopped:
                return here
            remaining = active.nonzero()[:, 0]
            rest = columns.select(remaining), point.select(remaining), n_iter[remaining]
            found = _descend_in_torch(*rest, preconditioner.select(remaining), limits, history.select(remaining))
            return here.with_columns(remaining, found)
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
    """Return steps [columns, p] that reduce the slope to `_SLOPE_FRACTION`, with the margins and residual there.

    The objective is convex along the line, so the sign of its slope brackets the minimum. The search is Newton's method
    on the slope, with bisection where it leaves the bracket. It needs one product, for the margins of the direction.
    """
    ahead, penalty_curvature = columns.line_terms(direction)
    slope_0, loss_slope_0 = dot(point.gradient, direction), dot(point.residual, ahead)
    size = torch.ones_like(slope_0)
    low, high = torch.zeros_like(size), torch.full_like(size, torch.inf)
    for _ in range(_MAX_TRIALS):
        there = torch.addcmul(point.margins, size, ahead)
        residual = columns.loss.residual(there)
        slope = slope_0 + size * penalty_curvature + (dot(residual, ahead) - loss_slope_0)
        steep = (slope.abs() > _SLOPE_FRACTION * slope_0.abs()) & active[:, None]
        if not bool(steep.any()):
            break
        low = torch.where(slope < 0, torch.maximum(low, size), low)
        high = torch.where(slope > 0, torch.minimum(high, size), high)
        curvature = penalty_curvature + dot(columns.loss.curvature(there), ahead * ahead)
        newton = size - slope / curvature
        middle = torch.where(high.isinf(), 2 * size, (low + high) / 2)
        size = torch.where(steep, torch.where((newton > low) & (newton < high), newton, middle), size)
    return size * direction, there, residual
