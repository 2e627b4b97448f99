"""The L-BFGS history on a CPU, compiled by Numba, for one column and for all columns.

As separate torch calls, the operations cost more in call overhead and contention for the GIL than in arithmetic.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.system.compiled import compiled

Floats = NDArray[np.float32] | NDArray[np.float64]
Ints = NDArray[np.int64]

_FAST = {"reassoc", "contract", "nsz"}


@compiled(fastmath=_FAST)
def store_pair_column(
    c: int,
    s: Floats,
    y: Floats,
    py: Floats,
    all_s: Floats,
    all_y: Floats,
    all_py: Floats,
    rho: Floats,
    gamma: Floats,
    slot: int,
) -> None:
    """Write column c's step, its change of gradient and the preconditioned change into a slot of the history.

    Args:
        c: The column.
        s: The step ``[columns, p]``.
        y: The change of gradient ``[columns, p]``.
        py: The preconditioned change of gradient of this column ``[p]``.
        all_s: The history of s ``[memory, columns, p]``.
        all_y: The history of y, of the same shape.
        all_py: The history of P y, of the same shape.
        rho: 1 / s.y ``[memory, columns]``; 0 without positive curvature.
        gamma: s.y / y.Py ``[columns]``; unchanged without positive curvature.
        slot: Index of the slot to write.
    """
    sy = ypy = s.dtype.type(0)
    for i in range(s.shape[1]):
        sy += s[c, i] * y[c, i]
        ypy += y[c, i] * py[i]
        all_s[slot, c, i], all_y[slot, c, i], all_py[slot, c, i] = s[c, i], y[c, i], py[i]
    rho[slot, c] = 0
    if sy > 0 and ypy > 0:
        rho[slot, c] = s.dtype.type(1) / sy
        gamma[c] = sy / ypy


@compiled(fastmath=_FAST)
def two_loops_column(
    c: int,
    gradient: Floats,
    newton: Floats,
    all_s: Floats,
    all_y: Floats,
    all_py: Floats,
    rho: Floats,
    gamma: Floats,
    n_steps: int,
    q: Floats,
    weights: Floats,
    step: Floats,
) -> None:
    """Write minus the inverse Hessian's estimate times the gradient into column c of a step (Nocedal 1980).

    Args:
        c: The column.
        gradient: ``[columns, p]``.
        newton: The preconditioner times the gradient ``[columns, p]``.
        all_s: As in `store_pair_column`, like the next four.
        all_y: ``[memory, columns, p]``.
        all_py: ``[memory, columns, p]``.
        rho: ``[memory, columns]``.
        gamma: ``[columns]``.
        n_steps: Steps so far; step i is at i % memory.
        q: Scratch ``[p]``.
        weights: Scratch ``[memory]``.
        step: ``[columns, p]``.
    """
    p, memory = gradient.shape[1], len(all_s)
    oldest = max(n_steps - memory, 0)
    for i in range(p):
        q[i], step[c, i] = gradient[c, i], -newton[c, i]
    if n_steps == 0:
        return
    for number in range(n_steps - 1, oldest - 1, -1):
        slot = number % memory
        a = q.dtype.type(0)
        for i in range(p):
            a += all_s[slot, c, i] * q[i]
        a *= rho[slot, c]
        weights[slot] = a
        for i in range(p):
            q[i] -= a * all_y[slot, c, i]
            step[c, i] += a * all_py[slot, c, i]
    for i in range(p):
        step[c, i] *= gamma[c]
    for number in range(oldest, n_steps):
        slot = number % memory
        b = q.dtype.type(0)
        for i in range(p):
            b += all_y[slot, c, i] * step[c, i]
        b = weights[slot] + rho[slot, c] * b
        for i in range(p):
            step[c, i] -= b * all_s[slot, c, i]


@compiled(fastmath=_FAST)
def store_pair(s: Floats, y: Floats, py: Floats, pairs: tuple[Floats, ...], gamma: Floats, slot: int) -> None:
    """Apply `store_pair_column` to all columns; py is ``[columns, p]``, pairs are the four arrays of the history."""
    all_s, all_y, all_py, rho = pairs
    for c in range(len(s)):
        store_pair_column(c, s, y, py[c], all_s, all_y, all_py, rho, gamma, slot)


@compiled(fastmath=_FAST)
def two_loops(gradient: Floats, newton: Floats, pairs: tuple[Floats, ...], gamma: Floats, n_steps: int) -> Floats:
    """Return `two_loops_column` of all columns ``[columns, p]``; pairs are the four arrays of the history."""
    all_s, all_y, all_py, rho = pairs
    step, q, weights = np.empty_like(gradient), np.empty_like(gradient[0]), np.empty_like(rho[:, 0])
    for c in range(len(gradient)):
        two_loops_column(c, gradient, newton, all_s, all_y, all_py, rho, gamma, n_steps, q, weights, step)
    return step
