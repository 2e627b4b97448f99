"""Preconditioned L-BFGS of dense problems on a CPU in one compiled loop: `lbfgs._descend` without the GIL.

As separate torch calls, an iteration on a few thousand rows costs more in call overhead and in waiting for the GIL than
in arithmetic: two threads that fitted probes on 400 rows at the same time took longer than one thread for both fits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.probing.backends.history_kernels import store_pair_column, two_loops_column
from delta_selectivity.system.compiled import compiled

Floats = NDArray[np.float32] | NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_FAST = {"reassoc", "contract", "nsz"}
_MAX_EXPONENT = 700.0  # exp of it does not overflow float64
_HALF = np.float32(0.5)
_SATURATED = np.float32(7.905)  # |x / 2| from which tanh is 1 in float32
_A1, _A3, _A5 = np.float32(4.89352455891786e-3), np.float32(6.37261928875436e-4), np.float32(1.48572235717979e-5)
_A7, _A9 = np.float32(5.12229709037114e-8), np.float32(-8.60467152213735e-11)
_A11, _A13 = np.float32(2.00018790482477e-13), np.float32(-2.76076847742355e-16)
_B0, _B2 = np.float32(4.89352518554385e-3), np.float32(2.26843463243900e-3)
_B4, _B6 = np.float32(1.18534705686654e-4), np.float32(1.19825839466702e-6)


@compiled(fastmath=_FAST)
def descend(
    features: tuple[Floats, Floats, NDArray[np.float32]],
    loss: tuple[Floats, Floats],
    logistic: bool,
    origin: tuple[Floats, Floats],
    point: tuple[Floats, Floats, Floats, Floats, Floats],
    n_iter: Ints,
    history: tuple[Floats, Floats, Floats, Floats, Floats, Ints],
    limits: tuple[float, float, int, int, bool],
    search: tuple[float, int],
) -> Bools:
    """Iterate each column until the limits are met; return whether it has converged, bool ``[columns]``.

    Args:
        features: z ``[rows, p]``, whose last column is 1; the factors of z for each column ``[columns, p]``; the
            preconditioner of all columns ``[1, p, p]``, or of each ``[columns, p, p]``.
        loss: `Loss.weight` and `Loss.positive_weight` ``[columns, rows]``; for a quadratic model twice its
            `second_derivative`.
        logistic: Whether the loss is logistic rather than quadratic.
        origin: The point of expansion of a quadratic model and the gradient there ``[columns, p]``; without columns for
            a logistic loss.
        point: theta ``[columns, p]``, margins and residual ``[columns, rows]``, gradient and preconditioned gradient
            ``[columns, p]``. Changed in place.
        n_iter: Iterations so far ``[columns]``. Changed in place.
        history: s, y, P y ``[memory, columns, p]``, 1 / s.y ``[memory, columns]``, gamma and number of steps
            ``[columns]``. Changed in place.
        limits: Tolerance, absolute tolerance, maximum number of iterations, patience (0: none), and whether to
            apply the final step to theta.
        search: `_SLOPE_FRACTION` and `_MAX_TRIALS` of the line search.
    """
    z, scale, inverse = features
    theta, margins, residual, gradient, newton = point
    all_s, all_y, all_py, rho, gamma, n_steps = history
    tolerance, floor, max_iter, patience, apply_final_step = limits
    columns, p = theta.shape
    rows, memory = len(z), len(all_s)
    converged = np.zeros(columns, np.bool_)
    shortest, stale = np.full(columns, np.inf, theta.dtype), np.zeros(columns, np.int64)
    active = np.arange(columns)
    direction, step, work = np.empty_like(theta), np.empty_like(theta), np.empty_like(theta)
    float32_gradient, preconditioned = np.empty((columns, p), np.float32), np.empty((columns, p), np.float32)
    ahead = np.empty_like(margins)
    curvature, q, weights = np.empty_like(z[:, 0]), np.empty_like(theta[0]), np.empty_like(rho[:, 0])
    while True:
        n_active = 0
        for c in active:
            newest, size = _norm(newton[c], p), _norm(theta[c], p - 1)
            short = newest <= tolerance * size + floor
            if patience:
                stale[c] = 0 if newest < shortest[c] else stale[c] + 1
                shortest[c] = min(shortest[c], newest)
            if short or (patience and stale[c] >= patience):
                converged[c] = True
                if apply_final_step and short:
                    two_loops_column(
                        c, gradient, newton, all_s, all_y, all_py, rho, gamma, n_steps[c], q, weights, step
                    )
                    for i in range(p):
                        theta[c, i] += step[c, i]
            elif n_iter[c] < max_iter:
                active[n_active] = c
                n_active += 1
        active = active[:n_active]
        if n_active == 0:
            return converged
        for k in range(n_active):
            c = active[k]
            n_iter[c] += 1
            two_loops_column(c, gradient, newton, all_s, all_y, all_py, rho, gamma, n_steps[c], q, weights, direction)
            for i in range(p):
                work[k, i] = direction[c, i] * scale[c, i]
        np.dot(work[:n_active], z.T, ahead[:n_active])
        for k in range(n_active):
            c = active[k]
            size = _search(
                c, k, margins, residual, gradient, direction, ahead, loss[0], loss[1], logistic, curvature, search
            )
            for i in range(p):
                step[c, i] = size * direction[c, i]
                theta[c, i] += step[c, i]
            for i in range(rows):
                ahead[k, i] = residual[c, i]
        np.dot(ahead[:n_active], z, work[:n_active])
        for k in range(n_active):
            c = active[k]
            for i in range(p):
                work[k, i] *= scale[c, i]
            if logistic:
                for i in range(p - 1):
                    work[k, i] += theta[c, i]
            else:
                for i in range(p - 1):
                    work[k, i] += theta[c, i] - origin[0][c, i]
                for i in range(p):
                    work[k, i] += origin[1][c, i]
            for i in range(p):
                float32_gradient[k, i] = work[k, i]
        if len(inverse) == 1:
            np.dot(float32_gradient[:n_active], inverse[0], preconditioned[:n_active])
        else:
            for k in range(n_active):
                np.dot(inverse[active[k]], float32_gradient[k], preconditioned[k])
        for k in range(n_active):
            c = active[k]
            for i in range(p):
                q[i] = preconditioned[k, i] - newton[c, i]
                newton[c, i] = preconditioned[k, i]
                direction[c, i] = work[k, i] - gradient[c, i]  # y
                gradient[c, i] = work[k, i]
            store_pair_column(c, step, direction, q, all_s, all_y, all_py, rho, gamma, n_steps[c] % memory)
            n_steps[c] += 1


@compiled(fastmath=_FAST)
def _norm(vector: Floats, n: int) -> float:
    total = vector.dtype.type(0)
    for i in range(n):
        total += vector[i] * vector[i]
    return math.sqrt(total)


@compiled(fastmath=_FAST)
def _search(
    c: int,
    k: int,
    margins: Floats,
    residual: Floats,
    gradient: Floats,
    direction: Floats,
    ahead: Floats,
    weight: Floats,
    positive_weight: Floats,
    logistic: bool,
    curvature: Floats,
    search: tuple[float, int],
) -> float:
    """Return a step size for column c, and move its margins and residual there; see `lbfgs._line_search`."""
    slope_fraction, max_trials = search
    rows, p = margins.shape[1], gradient.shape[1]
    real: Any = margins.dtype.type
    slope_0, penalty_curvature, loss_slope_0 = real(0), real(0), real(0)
    for i in range(p):
        slope_0 += gradient[c, i] * direction[c, i]
    for i in range(p - 1):
        penalty_curvature += direction[c, i] * direction[c, i]
    for i in range(rows):
        loss_slope_0 += residual[c, i] * ahead[k, i]
    size, low, high = real(1), real(0), real(np.inf)
    before = real(0)
    for _ in range(max_trials):
        move = size - before
        for i in range(rows):
            margins[c, i] += move * ahead[k, i]
        before = size
        if logistic:
            if margins.itemsize == 4:
                for i in range(rows):
                    share = _sigmoid_float32(margins[c, i])
                    residual[c, i] = weight[c, i] * share - positive_weight[c, i]
                    curvature[i] = weight[c, i] * (share - share * share)
            else:
                for i in range(rows):
                    share = _sigmoid_float64(margins[c, i])
                    residual[c, i] = weight[c, i] * share - positive_weight[c, i]
                    curvature[i] = weight[c, i] * (share - share * share)
        else:
            for i in range(rows):
                residual[c, i] = weight[c, i] * margins[c, i]
                curvature[i] = weight[c, i]
        change, second_derivative = -loss_slope_0, penalty_curvature
        for i in range(rows):
            change += residual[c, i] * ahead[k, i]
            second_derivative += curvature[i] * ahead[k, i] * ahead[k, i]
        slope = slope_0 + size * penalty_curvature + change
        if not abs(slope) > slope_fraction * abs(slope_0):
            break
        if slope < 0:
            low = max(low, size)
        elif slope > 0:
            high = min(high, size)
        newton = size - slope / second_derivative
        if low < newton < high:
            size = newton
        elif math.isinf(high):
            size = 2 * size
        else:
            size = (low + high) / 2
    return before


@compiled(fastmath=_FAST)
def _sigmoid_float32(margin: Any) -> Any:
    """Return the logistic function of a float32 to 2e-7, without branches or calls, so that loops vectorise.

    It uses tanh(x / 2), a quotient of polynomials with the coefficients of Eigen 3.4 (`generic_fast_tanh_float`).
    """
    x = margin * _HALF
    x = -_SATURATED if x < -_SATURATED else x  # in this form NaN stays NaN
    x = _SATURATED if x > _SATURATED else x
    square = x * x
    above = (((((_A13 * square + _A11) * square + _A9) * square + _A7) * square + _A5) * square + _A3) * square + _A1
    below = ((_B6 * square + _B4) * square + _B2) * square + _B0
    return _HALF + _HALF * x * above / below


@compiled(fastmath={"contract", "nsz"})
def _sigmoid_float64(margin: Any) -> Any:
    """Return the logistic function of a float64 to 1e-13, also without branches or calls.

    exp(-x) is computed as the 1024th power of exp(-x / 1024), which is computed by its Taylor polynomial.
    """
    x = -margin
    x = -_MAX_EXPONENT if x < -_MAX_EXPONENT else x
    x = _MAX_EXPONENT if x > _MAX_EXPONENT else x
    x *= 1 / 1024
    power = 1 / 720 + x * (1 / 5040)
    power = 1 / 24 + x * (1 / 120 + x * power)
    power = 1 + x * (1 + x * (1 / 2 + x * (1 / 6 + x * power)))
    power = power * power
    power = power * power
    power = power * power
    power = power * power
    power = power * power
    power = power * power
    power = power * power
    power = power * power
    power = power * power
    power = power * power
    return 1 / (1 + power)
