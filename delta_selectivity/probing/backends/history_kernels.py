"""The two-loop recursion of L-BFGS on a CPU, compiled by Numba.

As separate torch calls, the operations cost more in call overhead and contention for the GIL than in arithmetic.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.system.compiled import compiled

Floats = NDArray[np.float32] | NDArray[np.float64]


@compiled(fastmath={"reassoc", "contract", "nsz"})
def store_pair(s: Floats, y: Floats, py: Floats, pairs: tuple[Floats, ...], gamma: Floats, slot: int) -> None:
    """Write a step, its change of gradient and the preconditioned change into a slot of the history.

    Args:
        s: The step ``[columns, p]``.
        y: The change of gradient ``[columns, p]``.
        py: The preconditioned change of gradient ``[columns, p]``.
        pairs: The history of s, y and py ``[memory, columns, p]``, and 1 / s.y ``[memory, columns]``, which is 0 for
            columns without positive curvature.
        gamma: s.y / y.Py ``[columns]``; unchanged for columns without positive curvature.
        slot: Index of the slot to write.
    """
    all_s, all_y, all_py, rho = pairs
    columns, p = s.shape
    for c in range(columns):
        sy = ypy = s.dtype.type(0)
        for i in range(p):
            sy += s[c, i] * y[c, i]
            ypy += y[c, i] * py[c, i]
            all_s[slot, c, i], all_y[slot, c, i], all_py[slot, c, i] = s[c, i], y[c, i], py[c, i]
        rho[slot, c] = 0
        if sy > 0 and ypy > 0:
            rho[slot, c] = s.dtype.type(1) / sy
            gamma[c] = sy / ypy


@compiled(fastmath={"reassoc", "contract", "nsz"})
def two_loops(
    gradient: Floats, newton: Floats, pairs: tuple[Floats, ...], gamma: Floats, slots: NDArray[np.int64]
) -> Floats:
    """Return minus the inverse Hessian's estimate times the gradient ``[columns, p]`` (Nocedal 1980).

    Args:
        gradient: ``[columns, p]``.
        newton: The preconditioner times the gradient ``[columns, p]``.
        pairs: As in `store_pair`.
        gamma: ``[columns]``.
        slots: The slots in use, from the oldest step to the newest.
    """
    all_s, all_y, all_py, rho = pairs
    columns, p = gradient.shape
    step, q, weights = np.empty_like(gradient), np.empty_like(gradient[0]), np.empty_like(rho[:, 0])
    for c in range(columns):
        for i in range(p):
            q[i], step[c, i] = gradient[c, i], -newton[c, i]
        for slot in slots[::-1]:
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
        for slot in slots:
            b = q.dtype.type(0)
            for i in range(p):
                b += all_y[slot, c, i] * step[c, i]
            b = weights[slot] + rho[slot, c] * b
            for i in range(p):
                step[c, i] -= b * all_s[slot, c, i]
    return step
